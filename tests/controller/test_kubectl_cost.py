"""`kubectl ivft cost`: GPU-hours by stage and attempt, and their price."""

import io

import pytest
from controller.builders import NOW, at, text
from internvl_api.status import AttemptStatus, StageStatus
from internvl_operator.kubectl_ivft.__main__ import _console, _parser
from internvl_operator.kubectl_ivft.cost import lines
from internvl_operator.kubectl_ivft.render import cost_table

LOST = AttemptStatus(number=1, gpus=8, started_at=text(at(-5400)), finished_at=text(at(-3600)), reason="NodeLost")
RUNNING = AttemptStatus(number=2, gpus=8, started_at=text(at(-1800)))
CHECKED = AttemptStatus(number=1, started_at=text(at(-6000)), finished_at=text(at(-5900)), reason="Succeeded")
STAGES = [
    StageStatus(name="preflight", state="Succeeded", attempts=[CHECKED]),
    StageStatus(name="train", state="Running", attempts=[LOST, RUNNING], earlier_gpu_seconds=7200),
    StageStatus(name="publish"),
]


def test_every_attempt_has_a_line_and_the_sums_add_up() -> None:
    found = [(line.stage, line.attempt, round(line.gpu_hours, 3), line.ended) for line in lines(STAGES, NOW)]
    assert found == [
        ("preflight", "1", 0.0, "Succeeded"),
        ("train", "earlier", 2.0, ""),
        ("train", "1", 4.0, "NodeLost"),
        ("train", "2", 4.0, "running"),
        ("train", "all", 10.0, ""),
        ("run", "", 10.0, ""),
    ]


@pytest.mark.parametrize(("price", "last"), [(None, "run 10.00"), (2.5, "run 10.00 25.00")])
def test_the_price_adds_a_column(price: float | None, last: str) -> None:
    console = _console(io.StringIO(), 80)
    console.print(cost_table(lines(STAGES, NOW), price))
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert " ".join(shown[-1].split()) == last


def test_a_run_without_attempts_has_no_line() -> None:
    assert lines([StageStatus(name="train")], NOW) == []


@pytest.mark.parametrize("price", ["-1", "nan", "1e400", "free"])
def test_a_price_is_a_number(price: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["cost", "run", "--price", price])
    assert "expected" in capsys.readouterr().err
