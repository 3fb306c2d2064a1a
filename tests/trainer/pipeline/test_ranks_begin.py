"""Several ranks begin a stage: rank 0 looks at storage and at the inputs, the others take its word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName, StageResult
from internvl_trainer import run_context, stage_store
from internvl_trainer.artifacts import inputs as inputs_module
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.distributed import Group
from internvl_trainer.errors import AccessDenied, Unavailable, UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.stages.pipeline import run_stage
from trainer.contexts import context_of, store_of
from trainer.runs import make_config

ROW = {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]}


class OneOfTwo(Group):
    """A rank of two: rank 0 records what it says to all, rank 1 hears what rank 0 has said."""

    def __init__(self, rank: int, said: list[Any]) -> None:
        super().__init__(rank, 2, 0, torch.device("cpu"), None)
        self.said = said

    def first(self, value: Any) -> Any:
        if self.leads:
            self.said.append(json.dumps(value))
            return value
        assert value is None
        return json.loads(self.said.pop(0))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n")
    rows = str(tmp_path / "rows.jsonl")
    return make_config(
        str(tmp_path / "out"),
        data={"train": {"rows": {"annotation": rows}}},
        evaluation={"tasks": {"ask": {"task": "vqa", "annotation": rows}}, "publishIf": "vqa_accuracy > 0"},
    )


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> Callable[[int, StageName, list[Any]], StageResult]:
    """Runs a stage as one rank of two."""

    def run(rank: int, stage: StageName, said: list[Any]) -> StageResult:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(run_context, "join_group", lambda *_: OneOfTwo(rank, said))
        return run_stage(stage, config, Reporter(config.job, stage))

    return run


def forbid_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any look at storage or at an annotation file fails the test."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this rank made a request")

    for name in ("stat", "read", "list", "download", "write"):
        monkeypatch.setattr(FolderStorage, name, refuse)
    for name in ("list_shards", "describe_file", "fetch_file"):
        monkeypatch.setattr(inputs_module, name, refuse)


def finish(config: RunConfig, stage: StageName, **extra: Any) -> None:
    store_of(config).commit(stage, [], **extra)


def test_a_stage_that_is_done_is_looked_up_by_rank_0_alone(
    config: RunConfig, as_rank: Callable[..., StageResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(config, "train", artifacts={"model": "s3://x"})
    said: list[Any] = []
    first = as_rank(0, "train", said)
    assert (first.reason, first.artifacts) == ("AlreadyDone", {"model": "s3://x"})
    assert len(said) == 2
    forbid_requests(monkeypatch)
    assert as_rank(1, "train", said) == first
    assert said == []


@pytest.mark.parametrize(
    "error",
    [
        UserError("InputChanged", "the file has changed", "spec.data"),
        AccessDenied("AccessDenied", "s3://x was refused"),
        Unavailable("StorageUnavailable", "s3://x did not answer", None),
    ],
)
def test_every_rank_ends_with_the_error_of_rank_0(
    as_rank: Callable[..., StageResult], monkeypatch: pytest.MonkeyPatch, error: UserError
) -> None:
    def refuse(_: Any, *, reads_rows: bool = False) -> None:
        if reads_rows:  # not what rank 0 alone asks before it takes the lease
            raise error

    monkeypatch.setattr(stage_store.StageStore, "check_output", refuse)
    said: list[Any] = []
    ended = []
    for rank in range(2):
        with pytest.raises(UserError) as raised:
            as_rank(rank, "train", said)
        ended.append((type(raised.value), raised.value.reason, raised.value.message, raised.value.where))
    assert ended == [(type(error), error.reason, error.message, error.where)] * 2


def test_an_input_that_changed_stops_every_rank(
    config: RunConfig, as_rank: Callable[..., StageResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store_of(config).claim_output()
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 2)
    said: list[Any] = []
    with pytest.raises(UserError, match="has changed since"):
        as_rank(0, "train", said)
    forbid_requests(monkeypatch)
    with pytest.raises(UserError, match="has changed since") as raised:
        as_rank(1, "train", said)
    assert raised.value.reason == "InputChanged"


def test_versions_that_rank_0_found_hold_for_the_whole_stage(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(run_context, "join_group", lambda *_: OneOfTwo(0, said))
    first = context_of(config, "evaluate").join_group()
    forbid_requests(monkeypatch)
    monkeypatch.setattr(run_context, "join_group", lambda *_: OneOfTwo(1, said))
    alone = context_of(config, "evaluate")
    second = alone.join_group()
    assert second.stages.inputs == alone.stages.inputs == first.stages.inputs
    assert list(first.stages.inputs)
    assert second.stages.task_version("evaluate") == first.stages.task_version("evaluate")
