"""A preflight that checks a sample says so everywhere, and training names the bad row that it did not see."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from golden import checkpoint, read_file, settings, tokenizer_of
from internvl_api.validation.violations import SpecError
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.data.loader import Failure, RowDataset
from internvl_trainer.data.open_datasets import open_datasets
from internvl_trainer.data.preflight_results import read_row_sizes
from internvl_trainer.data.row_choice import choose_rows
from internvl_trainer.data.sampler import Position
from internvl_trainer.stages.preflight import run as preflight
from trainer.contexts import context_of
from trainer.retrieval.pair_runs import pair_config
from trainer.runs import make_config

TURNS = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]
SEED = 42


def run_with(folder: Path, bad: list[int], rows: int = 40, **data: Any) -> tuple[Any, dict[str, Any]]:
    """The run's context and its preflight.json; the given rows name a picture that is not there."""
    lines = [{"conversations": TURNS, **({"image": "none.png"} if row in bad else {})} for row in range(rows)]
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config = make_config(str(folder / "out"), data={"train": {"shop": {"annotation": str(path)}}, **data})
    context = context_of(config, "preflight")
    message = preflight(context).message
    report = json.loads(open_storage(config.output, field="").read("stages/preflight/preflight.json"))
    return context, {**report, "message": message}


def test_only_the_sample_is_checked_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = choose_rows(40, 8, SEED)
    missed = next(row for row in range(40) if row not in chosen)
    with caplog.at_level(logging.WARNING):
        context, report = run_with(tmp_path, [missed], preflight={"sample": 8})
    said = "only 8 of 40 rows were checked (data.preflight.sample 8)"
    assert said in report["message"]
    assert f"shop: {said}" in caplog.text
    (dataset,) = report["datasets"]
    assert (dataset["rowsChecked"], dataset["rowsUsed"], dataset["badRows"]) == (8, 40, 0)
    assert read_row_sizes(context.config, context.storage) is None, "sizes of a sample are of no use"


def test_a_bad_row_in_the_sample_stops_the_run(tmp_path: Path) -> None:
    row = choose_rows(40, 8, SEED)[3]
    with pytest.raises(Exception, match=rf"rows\.jsonl:{row + 1}: image: none\.png is not below"):
        run_with(tmp_path, [row], preflight={"sample": 8})


def test_a_sample_larger_than_the_data_is_a_whole_check(tmp_path: Path) -> None:
    context, report = run_with(tmp_path, [], preflight={"sample": 100})
    assert "only" not in report["message"]
    assert read_row_sizes(context.config, context.storage) is not None


def test_training_names_the_bad_row_that_the_sample_missed(tmp_path: Path) -> None:
    missed = next(row for row in range(40) if row not in choose_rows(40, 8, SEED))
    context, _ = run_with(tmp_path, [missed], preflight={"sample": 8})
    rows = RowDataset(
        open_datasets(context.config),
        settings("Hermes-2"),
        tokenizer_of(checkpoint("qwen2")),
        read_file,
        seed=1,
        bad_lines={},
        sample=8,
    )
    failure = rows[Position(0, missed)]
    assert isinstance(failure, Failure)
    assert failure.reason == "ImageMissing"
    assert f"rows.jsonl:{missed + 1}: image" in failure.message
    assert "preflight checked 8 rows of each dataset (data.preflight.sample)" in failure.message
    assert "did it change" not in failure.message


def test_pairs_are_sampled_too(tmp_path: Path) -> None:
    config = pair_config(tmp_path, str(tmp_path / "out"), data={"preflight": {"sample": 5}})
    images = sorted((tmp_path / "data" / "images").iterdir())
    chosen = choose_rows(24, 5, config.training.seed)
    lines = (tmp_path / "data" / "captions.txt").read_text().splitlines()[1:]
    seen = {lines[row].split(",")[0].split("/")[-1] for row in chosen}
    for path in images:
        if path.name not in seen:
            path.write_bytes(b"no picture")
    message = preflight(context_of(config, "preflight")).message
    assert "only 5 of 24 rows were checked" in message


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"data": {"badRows": "skip", "maxBadRows": 3}}, "spec.data.preflight.sample: found preflight.sample 8 with"),
        ({"training": {"packing": {"enabled": True}}}, "spec.data.preflight.sample: found 8 with training.packing"),
    ],
)
def test_what_needs_every_row_is_refused_with_a_sample(sections: dict[str, Any], field: str) -> None:
    data = {"preflight": {"sample": 8}, **sections.get("data", {})}
    with pytest.raises(SpecError, match="sample") as refused:
        make_config("/out", **{**sections, "data": data})
    assert field in str(refused.value)
