"""An annotation that is edited between two runs, or between stop and resume, is never mistaken for the old one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts.inputs import describe_inputs, first_changed
from internvl_trainer.errors import UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.stages.pipeline import run_stage
from trainer.contexts import store_of
from trainer.runs import make_config

ROW = {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]}
OTHER = {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a dog"}]}


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run with a file for each way in which a spec names one."""
    listed = write_rows(tmp_path / "listed.jsonl", ROW)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"listed": {"root": "", "annotation": Path(listed).name}}))
    return make_config(
        str(tmp_path / "out"),
        data={
            "train": {"rows": {"annotation": write_rows(tmp_path / "rows.jsonl", ROW)}},
            "validation": {"held": {"annotation": write_rows(tmp_path / "held.jsonl", ROW)}},
            "meta": str(meta),
        },
        evaluation={"tasks": {"ask": {"task": "vqa", "annotation": write_rows(tmp_path / "ask.jsonl", ROW)}}},
    )


def preflight(config: RunConfig) -> str:
    return run_stage("preflight", config, Reporter(config.job, "preflight")).reason


FILES = {
    "rows.jsonl": "data.train.rows.annotation",
    "listed.jsonl": "data.meta.listed",
    "held.jsonl": "data.validation.held.annotation",
    "ask.jsonl": "evaluation.tasks.ask.annotation",
}
TRAINED_ON = ("rows.jsonl", "listed.jsonl")


@pytest.mark.parametrize("file", FILES)
def test_preflight_checks_again_when_any_of_its_files_has_changed(config: RunConfig, tmp_path: Path, file: str) -> None:
    assert preflight(config) == "Checked"
    assert preflight(config) == "AlreadyDone"
    write_rows(tmp_path / file, OTHER)
    assert preflight(config) == "Checked"
    assert preflight(config) == "AlreadyDone"


@pytest.mark.parametrize("file", FILES)
def test_an_output_begun_on_other_rows_is_refused(config: RunConfig, tmp_path: Path, file: str) -> None:
    store_of(config).claim_output()
    write_rows(tmp_path / file, OTHER)
    store = store_of(config)
    store.check_output()
    if file not in TRAINED_ON:
        store.check_output(reads_rows=True)
        return
    with pytest.raises(UserError) as refused:
        store.check_output(reads_rows=True)
    assert refused.value.reason == "InputChanged"
    assert f"spec.{FILES[file]} ({tmp_path / file}) has changed" in str(refused.value)
    assert "choose another output or delete that one" in str(refused.value)


@pytest.mark.parametrize("file", TRAINED_ON)
def test_training_does_not_start_on_rows_that_preflight_has_not_checked(
    config: RunConfig, tmp_path: Path, file: str
) -> None:
    preflight(config)
    write_rows(tmp_path / file, OTHER)
    with pytest.raises(UserError, match="run preflight again"):
        run_stage("train", config, Reporter(config.job, "train"))


def test_the_same_content_written_again_is_no_change(config: RunConfig, tmp_path: Path) -> None:
    preflight(config)
    write_rows(tmp_path / "rows.jsonl", ROW)
    assert preflight(config) == "AlreadyDone"


def test_an_output_from_before_versions_were_recorded_goes_on(config: RunConfig) -> None:
    store = store_of(config)
    store.claim_output()
    document = json.loads(store.storage.read("run.json"))
    del document["inputs"]
    store.storage.write("run.json", json.dumps(document).encode())
    store_of(config).check_output(reads_rows=True)


def test_a_file_that_is_gone_does_not_undo_what_is_done(config: RunConfig, tmp_path: Path) -> None:
    preflight(config)
    (tmp_path / "rows.jsonl").unlink()
    assert preflight(config) == "AlreadyDone"
    assert not any("rows.jsonl" in name for name in describe_inputs(config))


@pytest.mark.parametrize("file", ["part-2.parquet", "part-1.parquet"], ids=["comes", "goes"])
def test_a_shard_that_comes_or_goes_is_a_change(tmp_path: Path, file: str) -> None:
    for number in (0, 1):
        (tmp_path / f"part-{number}.parquet").write_bytes(b"rows")
    data = {"train": {"rows": {"annotation": str(tmp_path / "part-*.parquet")}}}
    config = make_config(str(tmp_path / "out"), data=data)
    store_of(config).claim_output()
    store_of(config).check_output(reads_rows=True)
    shard = tmp_path / file
    shard.unlink() if shard.exists() else shard.write_bytes(b"more rows")
    with pytest.raises(UserError) as refused:
        store_of(config).check_output(reads_rows=True)
    assert refused.value.reason == "InputChanged"
    assert f"spec.data.train.rows.annotation ({shard}) has changed" in str(refused.value)


def test_answers_to_other_rows_are_answers_of_another_task(config: RunConfig, tmp_path: Path) -> None:
    before = store_of(config).task_version("evaluate")
    assert store_of(config).task_version("evaluate") == before
    write_rows(tmp_path / "rows.jsonl", OTHER)
    assert store_of(config).task_version("evaluate") == before
    write_rows(tmp_path / "ask.jsonl", OTHER)
    assert store_of(config).task_version("evaluate") != before


def test_the_first_changed_file_is_named_in_alphabetical_order() -> None:
    assert first_changed({"b": "1", "a": "1", "c": "1"}, {"b": "2", "a": "2"}) == "a"
    assert first_changed({"b": "1", "a": "1"}, {"b": "2", "a": "2"}, "b") == "b"
    assert first_changed({"b": "1"}, {"a": "2"}) is None
