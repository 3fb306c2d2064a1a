"""`report compare`: finished runs beside each other, from their outputs alone."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from internvl_api.constants import ExitCode
from internvl_trainer.__main__ import main
from internvl_trainer.artifacts.manifest import ManifestError
from internvl_trainer.cli.main import parse
from internvl_trainer.errors import UserError
from internvl_trainer.report.compare_page import differing, render_comparison, scores, summary, write_comparison
from internvl_trainer.report.run_outputs import RunResults, flatten, read_results
from trainer.report.outputs import Output, evaluated, prediction, steps
from trainer.report.test_report import EVIL, Page


def published(folder: Path, **sections: Any) -> Output:
    """A run with the artifacts that its publish stage makes of its stages."""
    output = evaluated(folder, **sections)
    rows = (folder / "out/stages/train/metrics.jsonl").read_bytes()
    figures = {name: {"coco": {"CIDEr": value}} for name, value in (("baseline", 0.25), ("final", 1.5))}
    for name, data in (("run.yaml", output.config.to_yaml().encode()), ("metrics.jsonl", rows),
                       ("evaluation.json", json.dumps(figures).encode())):  # fmt: skip
        output.storage.write(f"artifacts/{name}", data)
    for stage, value in (("baseline-evaluate", 0.25), ("evaluate", 1.5)):
        lines = [json.dumps(prediction(number, cider=value)) for number in range(8)]
        output.storage.write(f"artifacts/predictions/{stage}/coco.jsonl", "\n".join(lines).encode())
    output.storage.write("artifacts/manifest.json", json.dumps(
        {"version": 1, "fingerprint": "x", "created": "2026-03-01T23:50:00+00:00", "files": []}).encode())  # fmt: skip
    return output


def read(output: Output) -> RunResults:
    return read_results(output.config.output)


def test_a_published_run_is_read_from_its_artifacts(tmp_path: Path) -> None:
    found = read(published(tmp_path))
    assert (found.job, found.published) == ("team/run", datetime.fromisoformat("2026-03-01T23:50:00+00:00"))
    assert found.settings["training.learningRate"] == "0.003"
    assert not {"job", "output", "jobUid"} & found.settings.keys()
    assert len(found.steps) == 80
    (cider,) = found.compared["coco"]
    assert (cider.before, cider.after) == (0.25, 1.5)
    assert cider.interval is not None
    assert cider.outcome == "gain"


def test_a_run_below_its_condition_is_read_from_its_stages(tmp_path: Path) -> None:
    output = evaluated(tmp_path)
    output.stages.claim_output()
    found = read(output)
    assert (found.job, found.published, len(found.steps)) == ("team/run", None, 80)
    assert found.settings["training.learningRate"] == "0.003"
    outcomes = {each.metric: (each.before, each.after, each.outcome) for each in found.compared["coco"]}
    assert outcomes["CIDEr"] == (0.25, 1.5, "gain")
    assert outcomes["BLEU_4"] == (0.125, 0.0625, "unknown")


def test_a_place_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no run: neither artifacts") as caught:
        read_results(str(tmp_path / "wrong"))
    assert str(tmp_path / "wrong") in str(caught.value)
    with pytest.raises(UserError, match="http"):
        read_results("http://host/run")


@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl", "evaluation.json", "predictions/evaluate/coco.jsonl"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    output = published(tmp_path)
    output.storage.write(f"artifacts/{name}", b"{: [")
    with pytest.raises(ManifestError, match=f"artifacts/{name} cannot be read"):
        read(output)


@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl", "evaluation.json", "predictions/evaluate/coco.jsonl"])
def test_an_absent_file_leaves_a_dash(tmp_path: Path, name: str) -> None:
    output = published(tmp_path)
    output.storage.delete(f"artifacts/{name}")
    render_comparison([read(output), read(output)], None)


def test_rows_and_values_that_are_none_are_left_out(tmp_path: Path) -> None:
    output = published(tmp_path)
    lines = [json.dumps(each) for each in ({"step": 1}, {**steps(1)[0], "loss": float("nan")}, [], steps(2)[1])]
    output.storage.write("artifacts/metrics.jsonl", "\n".join(lines).encode())
    assert [row["step"] for row in read(output).steps] == [2]


def results(**changes: Any) -> RunResults:
    return RunResults(uri="/out", **changes)


def test_what_a_run_lacks_is_a_dash() -> None:
    row = {**steps(1)[0], "world_size": 8, "step_seconds": 3600.0, "validation_loss": 0.5}
    full = results(steps=[row], device="NVIDIA H200", peak_gpu_bytes=1 << 30)
    found = dict(summary([full, results()]))
    assert {value for _, value in found.values()} == {"–"}
    assert found["Hardware"][0] == "8 × NVIDIA H200"
    assert found["GPU-hours in steps"][0] == "8.00"
    assert found["Time in steps"][0] == "1 h 0 min"
    assert found["Validation loss, lowest"][0] == "0.5000"


@pytest.mark.parametrize("device", ["CPU", None])
def test_without_a_gpu_there_are_no_gpu_hours(device: str | None) -> None:
    assert results(steps=steps(3), device=device).gpu_hours is None


def test_only_settings_that_differ_are_listed() -> None:
    one, other = results(settings={"a": "1", "b": "2"}), results(settings={"a": "1", "b": "3", "c": "4"})
    assert differing([one, other]) == [("b", ["2", "3"]), ("c", ["–", "4"])]
    assert differing([one, one]) == []


def test_scores_of_tasks_that_not_every_run_has(tmp_path: Path) -> None:
    run = read(published(tmp_path))
    (row,) = scores([results(), run])["coco"]
    assert (row.metric, row.cells[0]) == ("CIDEr", None)
    assert row.cells[1] is not None


def test_settings_are_bounded() -> None:
    deep: dict[str, Any] = {"end": "x"}
    for _ in range(100):
        deep = {"a": deep}
    ((path, value),) = flatten(deep)
    assert path.count(".") < 20
    assert len(value) <= 200
    assert len(list(flatten({str(number): number for number in range(9000)}))) == 2000
    assert dict(flatten({"list": [1, "a"], "none": None, "empty": {}, "no": False})) == {
        "list": '[1, "a"]',
        "no": "false",
    }
    assert list(flatten(["no settings"])) == []


def test_the_page_needs_nothing_else_and_data_cannot_act_in_it(tmp_path: Path) -> None:
    evil = results(job=EVIL, settings={EVIL: EVIL}, steps=steps(3), device=EVIL)
    page, plot = write_comparison([evil, results()], tmp_path)
    read_page = Page(page.read_text(encoding="utf-8"))
    assert plot.name == "loss.png"
    assert not read_page.tags("script")
    assert not [attributes for _, attributes in read_page.elements if "onerror" in attributes]
    assert read_page.text.count("<script>alert(1)</script>") >= 4
    addresses = [value for _, attributes in read_page.elements for name, value in attributes.items()
                 if name in ("src", "srcset", "href")]  # fmt: skip
    assert {str(value).partition(":")[0] for value in addresses} == {"data"}
    policy = next(meta["content"] for meta in read_page.tags("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    runs = [results(steps=steps(70)), results(steps=steps(3))]
    first, second = (write_comparison(runs, tmp_path / name)[0].read_bytes() for name in ("one", "two"))
    assert first == second


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = published(tmp_path / "one"), published(tmp_path / "two", training={"learningRate": 1e-4})
    target = tmp_path / "comparison"
    assert main(["report", "compare", one.config.output, two.config.output, "--out", str(target)]) == ExitCode.OK
    assert capsys.readouterr().out.splitlines() == [f"{target}/index.html", f"{target}/loss.png"]
    text = Page((target / "index.html").read_text(encoding="utf-8")).text
    assert "training.learningRate 0.003 0.0001" in text
    assert "CIDEr 1.5000 +1.2500 +1.2500 to +1.2500 1.5000" in text


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = published(tmp_path)
    arguments = ["report", "compare", output.config.output]
    assert main(arguments) == ExitCode.USER_ERROR
    assert capsys.readouterr().err == "report compare: found 1 outputs, expected 2 to 8\n"
    assert main([*arguments, str(tmp_path / "gone")]) == ExitCode.USER_ERROR
    assert f"{tmp_path}/gone: found no run" in capsys.readouterr().err


def test_options_of_both_forms() -> None:
    alone = parse(["report", "--config", "run.yaml"])
    assert (alone.action, str(alone.out)) == (None, "report")
    assert str(parse(["report", "compare", "a", "b"]).out) == "comparison"
