"""Rows checked in shards: by one process or two, in one go or after a kill, with the same findings."""

import hashlib
import json
import multiprocessing
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from golden import GOLDEN, checkpoint, read_file, settings, tokenizer_of
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.diagnostics import Finding, with_counts
from internvl_trainer.data.index import RowIndex
from internvl_trainer.data.row_checks import ChatRows, Checker
from internvl_trainer.data.row_choice import choose_rows
from internvl_trainer.stages import row_shards
from internvl_trainer.stages.row_shards import ShardStore, check_in_shards, check_shard
from trainer.folding import fold_repeated

ROWS, SHARD = 70, 16


class Killed(BaseException):
    """What ends the process in the middle."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_shards, "SHARD_ROWS", SHARD)


@pytest.fixture
def rows(tmp_path: Path) -> ChatRows:
    """Rows with an unknown field, which is said once for the file, and some that are broken."""
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]
    lines = [{"conversations": turns, "licence": "free"} for _ in range(ROWS)]
    lines[20] = {"image": "none.jpg", "conversations": turns}
    lines[69] = {"id": "half of a pair: \ud83d"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    dataset = DatasetDescription("shop", str(GOLDEN / "data"), str(path))
    checker = Checker(dataset, settings("Hermes-2"), read_file, tokenizer_of(checkpoint("qwen2")))
    return ChatRows(RowIndex.build(path), checker)


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(FolderStorage(tmp_path / "output", field="spec.output"), "stages/preflight/shards", "x")


@pytest.mark.parametrize("processes", [1, 2])
def test_any_number_of_processes_finds_the_same(rows: ChatRows, store: ShardStore, processes: int) -> None:
    expected, sizes = np.zeros((ROWS, 2), np.int32), np.zeros((ROWS, 2), np.int32)
    alone = fold_repeated(rows.check(range(ROWS), expected))
    found = with_counts(check_in_shards(rows, range(ROWS), store, sizes, processes=processes))
    assert found == alone
    assert "(68 times in this file)" in found[0].message
    assert (sizes == expected).all()
    assert sizes[0, 0] > 0


def test_a_killed_preflight_goes_on_where_it_was(
    rows: ChatRows, store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []

    def counted(source: row_shards.Rows, chosen: Sequence[int], span: range) -> row_shards.Shard:
        checked.append(span.start)
        return check_shard(source, chosen, span)

    def killed_after_two(done: int) -> None:
        if done == 2 * SHARD:
            raise Killed

    monkeypatch.setattr(row_shards, "check_shard", counted)
    with pytest.raises(Killed):
        check_in_shards(rows, range(ROWS), store, np.zeros((ROWS, 2), np.int32), processes=1, tell=killed_after_two)
    sizes, said = np.zeros((ROWS, 2), np.int32), []
    found = with_counts(check_in_shards(rows, range(ROWS), store, sizes, processes=1, tell=said.append))
    assert checked == [0, 16, 32, 48, 64], "no shard twice"
    assert said == [32, 48, 64, 70], "the progress begins with what was done"
    expected = np.zeros((ROWS, 2), np.int32)
    assert found == fold_repeated(rows.check(range(ROWS), expected))
    assert (sizes == expected).all()


class Stuck:
    """The first two shards' rows, and others whose check never ends."""

    def __init__(self, rows: ChatRows) -> None:
        self.rows = rows

    def check(self, rows: Sequence[int], sizes: np.ndarray) -> list[Finding]:
        while rows[0] >= 2 * SHARD:
            signal.pause()
        return self.rows.check(rows, sizes)

    def reopened(self) -> "Stuck":
        return Stuck(self.rows.reopened())


def test_processes_that_are_killed_leave_what_they_have_stored(rows: ChatRows, store: ShardStore) -> None:
    """SIGKILL, as at the end of a pod, while every process checks rows."""
    context = multiprocessing.get_context("fork")
    stored = context.Semaphore(0)

    def tell(done: int) -> None:
        if done == 2 * SHARD:
            stored.release()

    sizes = np.zeros((ROWS, 2), np.int32)
    work = context.Process(
        target=check_in_shards, args=(Stuck(rows), range(ROWS), store, sizes), kwargs={"processes": 2, "tell": tell}
    )
    work.start()
    assert stored.acquire(timeout=300)
    work.kill()
    work.join()
    assert store.finished() == {0, SHARD}
    assert_all_is_found(rows, store)


def signed(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(b"{", id="cut off"),
        pytest.param(signed(b"{"), id="no JSON"),
        pytest.param(
            signed(b'{"version": 2, "key": "x", "first": 0, "rows": 16, "findings": [], "sizes": "AAAA"}'),
            id="too few sizes",
        ),
        pytest.param(
            signed(b'{"version": 2, "key": "x", "first": 0, "rows": 16, "findings": [[{}, 1]], "sizes": ""}'),
            id="no finding",
        ),
        pytest.param(
            signed(b'{"version": 2, "key": "x", "first": 7, "rows": 1, "findings": [], "sizes": "AAAAAAAAAAA="}'),
            id="no shard",
        ),
    ],
)
def test_a_stored_shard_that_is_none_is_checked_again(
    rows: ChatRows, store: ShardStore, tmp_path: Path, stored: bytes
) -> None:
    place = tmp_path / "output" / "stages" / "preflight" / "shards" / "x"
    place.mkdir(parents=True)
    (place / "000000000000.json").write_bytes(stored)
    assert_all_is_found(rows, store)


@pytest.mark.parametrize("change", ["one byte", "another key", "another version"])
def test_a_good_shard_that_was_changed_is_checked_again(
    rows: ChatRows, store: ShardStore, tmp_path: Path, change: str
) -> None:
    check_in_shards(rows, range(ROWS), store, np.zeros((ROWS, 2), np.int32), processes=1)
    for path in (tmp_path / "output" / "stages" / "preflight" / "shards" / "x").iterdir():
        digest, _, text = path.read_bytes().partition(b"\n")
        shard = json.loads(text)
        shard["findings"], shard["sizes"] = [], shard["sizes"].replace("A", "B")
        shard |= {"another key": {"key": "y"}, "another version": {"version": 1}}.get(change, {})
        forged = json.dumps(shard).encode()
        path.write_bytes(digest + b"\n" + forged if change == "one byte" else signed(forged))
    assert_all_is_found(rows, store)


def assert_all_is_found(rows: ChatRows, store: ShardStore) -> None:
    expected, sizes = np.zeros((ROWS, 2), np.int32), np.zeros((ROWS, 2), np.int32)
    found = with_counts(check_in_shards(rows, range(ROWS), store, sizes, processes=1))
    assert found == fold_repeated(rows.check(range(ROWS), expected))
    assert (sizes == expected).all()


def test_a_small_dataset_stores_nothing(store: ShardStore, rows: ChatRows, tmp_path: Path) -> None:
    check_in_shards(rows, range(SHARD), store, np.zeros((SHARD, 2), np.int32), processes=2)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sample_finds_what_its_rows_have(rows: ChatRows, store: ShardStore, processes: int) -> None:
    chosen = [3, 20, *range(30, 60), 69]
    expected, sizes = np.zeros((len(chosen), 2), np.int32), np.zeros((len(chosen), 2), np.int32)
    alone = fold_repeated(rows.check(chosen, expected))
    assert with_counts(check_in_shards(rows, chosen, store, sizes, processes=processes)) == alone
    assert [finding.line for finding in alone if finding.severity == "error"] == [21, 70]
    assert (sizes == expected).all()


def test_a_sample_is_spread_evenly_and_the_same_each_time() -> None:
    chosen = choose_rows(1_000_003, 1000, seed=7)
    assert chosen == choose_rows(1_000_003, 1000, seed=7) != choose_rows(1_000_003, 1000, seed=8)
    stretches = [row * 1000 // 1_000_003 for row in chosen]
    assert all(abs(found - wanted) <= 1 for wanted, found in enumerate(stretches))
    assert len(set(chosen)) == 1000
    assert sorted(chosen) == chosen


@pytest.mark.parametrize("sample", [None, 70, 71])
def test_a_sample_as_large_as_the_dataset_is_all_of_it(sample: int | None) -> None:
    assert list(choose_rows(70, sample, seed=7)) == list(range(70))
