"""data.preflight.workers: pods that share the rows find what one pod finds, and none waits for another."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.errors import UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.stages import row_shards
from internvl_trainer.stages.pipeline import run_stage
from internvl_trainer.stages.row_parts import Part, check_part
from internvl_trainer.stages.row_shards import Rows, ShardStore, check_in_shards, spans_of
from trainer.contexts import context_of
from trainer.runs import make_config

ROWS, SHARD = 100, 16
FIRST = list(range(0, ROWS, SHARD))  # of each shard


class Numbers:
    """Rows without findings whose tokens are their number; `seen` gets each row that is checked."""

    def __init__(self, see: Callable[[int], None]) -> None:
        self.see = see

    def check(self, rows: Sequence[int], sizes: np.ndarray) -> list[Any]:
        for position, row in enumerate(rows):
            sizes[position] = row + 1, 1
        self.see(rows[0])
        return []

    def reopened(self) -> Numbers:
        return self


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_shards, "SHARD_ROWS", SHARD)


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(FolderStorage(tmp_path / "shards", field="spec.output"), "shards", "x")


def results(store: ShardStore, rows: Rows) -> np.ndarray:
    """The sizes that the first pod reads at the end."""
    sizes = np.zeros((ROWS, 2), np.int32)
    assert check_in_shards(rows, range(ROWS), store, sizes, processes=1) == []
    return sizes


@pytest.mark.parametrize("pods", [1, 2, 3, 7, 64])
def test_every_pod_has_its_own_part_first_and_then_all_others(pods: int) -> None:
    spans = spans_of(ROWS)
    orders = [Part(pod, pods).order(spans) for pod in range(pods)]
    assert all(sorted(span.start for span in order) == FIRST for order in orders)
    own = [order[: len(spans[pod::pods])] for pod, order in enumerate(orders)]
    assert sorted(span.start for part in own for span in part) == FIRST, "the parts are all rows, each once"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_pod_whose_peers_never_start_checks_everything(store: ShardStore, processes: int) -> None:
    seen: list[int] = []
    check_part(Numbers(seen.append), range(ROWS), store, Part(1, 3), processes=processes)
    assert store.finished() == set(FIRST)
    if processes == 1:
        assert seen[:2] == FIRST[1::3], "its own part first"
    assert (results(store, Numbers(pytest.fail))[:, 0] == np.arange(1, ROWS + 1)).all()


def test_a_pod_leaves_out_what_another_has_stored_meanwhile(store: ShardStore) -> None:
    """The other pod stores its whole part while this one checks its second shard."""
    theirs: list[int] = []
    mine: list[int] = []
    said: list[int] = []

    def see(row: int) -> None:
        mine.append(row)
        if len(mine) == 2:
            other = Numbers(theirs.append)
            killed = {"is_over": lambda: len(theirs) == 3, "listed_seconds": 0}
            check_part(other, range(ROWS), store, Part(1, 2), processes=1, **killed)

    check_part(Numbers(see), range(ROWS), store, Part(0, 2), processes=1, tell=said.append, listed_seconds=0)
    assert mine == FIRST[0::2]
    assert theirs == FIRST[1::2]
    assert said == [16, 32, 96, 100], "progress counts the rows of both"


def test_a_pod_ends_when_the_stage_is_finished(store: ShardStore) -> None:
    """The first pod deletes the shards at its end; what is left of them is not checked again."""
    check_part(Numbers(pytest.fail), range(ROWS), store, Part(1, 2), processes=1, is_over=lambda: True)
    assert store.finished() == set()


def test_two_pods_at_the_same_time_find_all_rows(store: ShardStore) -> None:
    context = multiprocessing.get_context("fork")
    pods = [
        context.Process(
            target=check_part,
            args=(Numbers(lambda _: None), range(ROWS), store, Part(pod, 2)),
            kwargs={"processes": 1, "listed_seconds": 0.0},
        )
        for pod in range(2)
    ]
    for pod in pods:
        pod.start()
    for pod in pods:
        pod.join()
        assert pod.exitcode == 0
    assert (results(store, Numbers(pytest.fail))[:, 0] == np.arange(1, ROWS + 1)).all()


def test_one_shard_is_not_shared(store: ShardStore) -> None:
    check_part(Numbers(pytest.fail), range(SHARD), store, Part(1, 2), processes=1)
    assert store.finished() == set()


def test_a_foreign_file_among_the_shards_is_no_shard(store: ShardStore, tmp_path: Path) -> None:
    check_part(Numbers(lambda _: None), range(ROWS), store, Part(1, 2), processes=1)
    folder = tmp_path / "shards" / "shards" / "x"
    for name in ("notes.txt", "0.json", "-00000000016.json", "000000000016.json.bak"):
        (folder / name).write_text("{}")
    assert store.finished() == set(FIRST)


def run_of(folder: Path, output: str, lines: list[dict[str, Any]], workers: int) -> RunConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    data = {"train": {"shop": {"annotation": str(path)}}, "preflight": {"workers": workers}}
    return make_config(str(folder / output), data=data)


def good_rows() -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]
    return [{"conversations": turns, "licence": "free"} for _ in range(ROWS)]


def as_pod(monkeypatch: pytest.MonkeyPatch, pod: int, pods: int) -> None:
    monkeypatch.setenv("RANK", str(pod))
    monkeypatch.setenv("WORLD_SIZE", str(pods))


def run_pod(config: RunConfig) -> Any:
    return run_stage("preflight", config, Reporter(config.job, "preflight"))


def test_a_helping_pod_writes_nothing_but_shards_which_the_first_pod_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run_of(tmp_path, "alone", good_rows(), workers=1)
    assert run_pod(alone).outcome == "succeeded"
    shared = run_of(tmp_path, "shared", good_rows(), workers=2)
    as_pod(monkeypatch, 1, 2)
    assert run_pod(shared).message == "checked its part of the rows"
    written = [file.key for file in context_of(shared, "preflight").storage.list()]
    assert len(written) == len(FIRST)
    assert all(key.startswith("stages/preflight/shards/") for key in written)

    as_pod(monkeypatch, 0, 2)
    monkeypatch.setattr(row_shards, "check_shard", pytest.fail)  # every row is checked already
    assert run_pod(shared).outcome == "succeeded"
    reports = [
        json.loads(context_of(config, "preflight").storage.read("stages/preflight/preflight.json"))
        for config in (alone, shared)
    ]
    assert reports[0] == reports[1]
    assert reports[1]["datasets"][0]["rowsChecked"] == ROWS
    as_pod(monkeypatch, 1, 2)
    assert run_pod(shared).reason == "AlreadyDone", "a helping pod that starts late has nothing to do"


def test_bad_rows_of_any_part_end_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = good_rows()
    lines[20] = {"image": "none.jpg", **lines[20]}  # in the part of the second pod
    config = run_of(tmp_path, "output", lines, workers=2)
    as_pod(monkeypatch, 1, 2)
    assert run_pod(config).outcome == "succeeded", "the first pod decides, with all findings"
    as_pod(monkeypatch, 0, 2)
    with pytest.raises(UserError, match=r"rows\.jsonl:21"):
        run_pod(config)


def test_the_number_of_pods_does_not_change_the_result(tmp_path: Path) -> None:
    """So a run may get more pods, and what was checked stays checked."""
    one, many = (run_of(tmp_path, "output", good_rows(), workers=workers) for workers in (1, 8))
    assert run_pod(one).reason == "Checked"
    assert run_pod(many).reason == "AlreadyDone"
