"""Checkpoints are stored while training goes on, and whatever dies meanwhile, a whole one is resumed bit for bit."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from internvl_trainer.artifacts.manifest import check_sizes, fetch_files, read_manifest
from internvl_trainer.artifacts.output_layout import stored_checkpoints
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.errors import AccessDenied, UserError
from internvl_trainer.train import checkpoint as checkpoint_module
from internvl_trainer.train import host_share
from internvl_trainer.train.checkpoint import Checkpoints
from internvl_trainer.train.optimizer_shards import KINDS, WEIGHT
from trainer.contexts import Alone
from trainer.train.toy_training import SHAPES, STEPS, Killed, ToyEngine, state_of, together, train

WRITES = ("upload", "write", "delete")


@pytest.fixture(autouse=True)
def _toy_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Checkpoints of toy engines, in files of a hundred bytes."""
    shapes = {name: [size] for name, size in SHAPES.items()}
    monkeypatch.setattr(checkpoint_module, "local_fragments", lambda engine, _: engine.parts)
    monkeypatch.setattr(checkpoint_module, "trainable_shapes", lambda _: shapes)
    for name in ("set_optimizer_step", "use_restored_weights"):
        monkeypatch.setattr(checkpoint_module, name, lambda *_: None)
    monkeypatch.setattr(host_share, "FILE_BYTES", 120)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))


class Storage(FolderStorage):
    """A folder whose `number`-th change does not happen: the process that asks for it dies."""

    def __init__(self, root: Path, number: int = 0) -> None:
        super().__init__(root, field="spec.output")
        self.changes, self._number, self._lock = 0, number, threading.Lock()

    def __getattribute__(self, name: str) -> Any:
        if name in WRITES:
            with self._lock:
                self.changes += 1
                if self.changes == self._number:
                    raise Killed(name)
        return super().__getattribute__(name)


class Gate(FolderStorage):
    """Uploads wait until `open` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, field="spec.output")
        self.open, self.asked = threading.Event(), threading.Event()

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        self.asked.set()
        assert self.open.wait(60)
        super().upload(path, key, sha256=sha256)


def check_whole(root: Path, scratch: Path) -> list[str]:
    """The checkpoints with a manifest, each with all its files as the manifest says."""
    storage = FolderStorage(root, field="spec.output")
    for folder in stored_checkpoints(storage):
        manifest = read_manifest(storage, folder)
        assert manifest is not None
        check_sizes(storage, folder, manifest)
        fetch_files(storage, folder, manifest.files, scratch / folder)
    return stored_checkpoints(storage)


def run(storage: FolderStorage, folder: Path, world_size: int) -> dict[str, list[float]]:
    """The state of all ranks after an attempt; without those that ended early."""
    ended = together(world_size, lambda group: train(storage, group, folder / str(group.rank), keep=1))
    return state_of([engine for engine in ended if isinstance(engine, ToyEngine)])


@pytest.mark.parametrize("next_world_size", [2, 1])
def test_killed_at_any_change_of_storage_it_resumes_bit_for_bit(next_world_size: int, tmp_path: Path) -> None:
    undisturbed = Storage(tmp_path / "undisturbed")
    wanted = run(undisturbed, tmp_path / "log", 2)
    assert undisturbed.changes > 15
    resumed = set()
    for number in range(1, undisturbed.changes + 1):
        root = tmp_path / str(number)
        run(Storage(root, number), root / "first", 2)
        whole = check_whole(root, tmp_path / "checked")
        state = run(FolderStorage(root, field="spec.output"), root / "again", next_world_size)
        assert state == wanted, f"killed at change {number}"
        assert (root / "again" / "0" / "journal").exists() == bool(whole)
        resumed.add(whole[0] if whole else None)
        assert check_whole(root, tmp_path / "checked")[0] == "checkpoints/step-00000004"
    assert resumed == {None, "checkpoints/step-00000002", "checkpoints/step-00000004"}, "every phase was met"


def test_steps_go_on_while_an_upload_is_blocked(tmp_path: Path) -> None:
    storage, engine = Gate(tmp_path / "out"), ToyEngine(0, 1)
    checkpoints = Checkpoints(storage, Alone(), fingerprint="f", keep=1)
    engine.take_step()
    saved = state_of([engine])
    checkpoints.save(engine, 1, {})
    assert storage.asked.wait(60)
    for _ in range(3):
        assert checkpoints.advance(checkpoints.ready()) is None
        engine.take_step()
    assert checkpoints.in_flight is not None
    assert checkpoints.newest is None
    assert stored_checkpoints(storage) == []
    storage.open.set()
    figures = checkpoints.finish()
    assert figures is not None
    assert (figures.step, checkpoints.in_flight) == (1, None)
    assert checkpoints.newest is not None
    assert checkpoints.newest.step == 1
    resumed = ToyEngine(0, 1)
    assert Checkpoints(storage, Alone(), fingerprint="f", keep=1).restore(resumed, tmp_path / "log") == 1
    assert state_of([resumed]) == saved, "it is the state of the snapshot, not of the steps after it"


def test_the_next_checkpoint_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    storage, engine = Gate(tmp_path / "out"), ToyEngine(0, 1)
    checkpoints = Checkpoints(storage, Alone(), fingerprint="f", keep=5)
    checkpoints.save(engine, 1, {})
    waiting = threading.Thread(target=lambda: checkpoints.save(engine, 2, {}))
    waiting.start()
    assert storage.asked.wait(60)
    assert checkpoints.in_flight is not None
    assert checkpoints.in_flight.step == 1
    storage.open.set()
    waiting.join(60)
    checkpoints.finish()
    assert stored_checkpoints(storage) == ["checkpoints/step-00000002", "checkpoints/step-00000001"]


def test_an_error_in_the_background_comes_up_at_the_next_step(tmp_path: Path) -> None:
    class Refusing(FolderStorage):
        def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
            raise AccessDenied("AccessDenied", "the bucket's policy has changed", "spec.output")

    storage = Refusing(tmp_path / "out", field="spec.output")
    checkpoints = Checkpoints(storage, Alone(), fingerprint="f", keep=1)
    checkpoints.save(ToyEngine(0, 1), 1, {})
    assert checkpoints.in_flight is not None
    checkpoints.in_flight.storing.exception(60)  # wait for it
    with pytest.raises(AccessDenied, match="policy has changed"):
        checkpoints.ready()
    assert stored_checkpoints(storage) == []


def _size(path: Path) -> int:
    """Bytes of a share's file in scratch; 0 for another file, and for one that is removed meanwhile."""
    try:
        return path.stat().st_size if path.name.startswith("rank-") else 0
    except FileNotFoundError:
        return 0


def test_scratch_holds_the_files_in_flight_only(tmp_path: Path) -> None:
    scratch, seen = tmp_path / "scratch", []

    class Watched(FolderStorage):
        def _look(self, key: str) -> None:
            if "rank-" in key:
                seen.append(sum(_size(Path(folder) / name) for folder, _, names in os.walk(scratch) for name in names))

        def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
            self._look(key)
            super().upload(path, key, sha256=sha256)

        def download(self, key: str, path: Path) -> None:
            super().download(key, path)
            self._look(key)

    storage, engine = Watched(tmp_path / "out", field="spec.output"), ToyEngine(0, 1)
    checkpoints = Checkpoints(storage, Alone(), fingerprint="f", keep=1)
    checkpoints.save(engine, 1, {})
    checkpoints.finish()
    written, sizes = list(seen), sorted(file.size for file in storage.list("checkpoints/") if "rank-" in file.key)
    assert len(sizes) >= 4
    assert max(written) <= sizes[-1]
    seen.clear()
    checkpoints.restore(ToyEngine(0, 1), tmp_path / "log")
    assert len(seen) == len(sizes)
    assert max(seen) <= sizes[-1] + sizes[-2]
    assert list(scratch.iterdir()) == []


def test_a_scratch_disk_too_small_is_named_before_a_file_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FolderStorage(tmp_path / "out", field="spec.output")
    checkpoints = Checkpoints(storage, Alone(), fingerprint="f", keep=1)
    checkpoints.save(ToyEngine(0, 1), 1, {})
    checkpoints.finish()
    engine = ToyEngine(0, 1)
    before = state_of([engine])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="resuming from a checkpoint, two files at a time, needs") as refused:
        checkpoints.restore(engine, tmp_path / "log")
    assert refused.value.reason == "DiskFull"
    assert state_of([engine]) == before


def test_a_container_without_room_keeps_the_snapshot_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mapped: list[str] = []
    from_file = torch.from_file

    def noted(name: str, **options: Any) -> torch.Tensor:
        mapped.append(name)
        return from_file(name, **options)

    monkeypatch.setattr(torch, "from_file", noted)
    monkeypatch.setattr(host_share, "free_container_memory", lambda: 42 * len(KINDS) * 4 * 8)
    storage, engine = FolderStorage(tmp_path / "out", field="spec.output"), ToyEngine(0, 1)
    roomy = Checkpoints(storage, Alone(), fingerprint="f", keep=1, processes=4)
    roomy.save(engine, 1, {})
    roomy.finish()
    assert (mapped, caplog.text) == ([], "")
    tight = Checkpoints(storage, Alone(), fingerprint="f", keep=1, processes=8)
    engine.take_step()
    tight.save(engine, 2, {})
    tight.finish()
    assert len(mapped) == 1
    assert not Path(mapped[0]).exists()
    assert "Raise the memory limit of podTemplate.resources" in caplog.text
    resumed = ToyEngine(0, 1)
    again = Checkpoints(storage, Alone(), fingerprint="f", keep=1)
    assert again.restore(resumed, tmp_path / "log") == 2
    assert state_of([resumed]) == state_of([engine])


def test_weights_alone_count_only_after_the_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage, engine = FolderStorage(tmp_path / "out", field="spec.output"), ToyEngine(0, 1)
    checkpoints = Checkpoints(storage, Alone(), fingerprint="f", keep=5)
    engine.take_step()
    checkpoints.save(engine, 1, {})
    engine.take_step()
    checkpoints.save(engine, STEPS, {}, kinds=(WEIGHT,))
    checkpoints.finish()
    manifest = read_manifest(storage, f"checkpoints/step-{STEPS:08d}")
    assert manifest is not None
    whole = read_manifest(storage, "checkpoints/step-00000001")
    assert whole is not None
    assert manifest.size < whole.size * 0.6
    resumed, again = ToyEngine(0, 1), Checkpoints(storage, Alone(), fingerprint="f", keep=5)
    assert again.restore(resumed, tmp_path / "log", total_steps=STEPS) == STEPS
    assert resumed.values()["weight/norm"] == engine.values()["weight/norm"]
    assert again.restore(resumed, tmp_path / "log", total_steps=STEPS + 1) == 1
    assert "has no optimizer state, and steps are left to take" in caplog.text


def test_weights_alone_count_where_training_ended_early(tmp_path: Path) -> None:
    storage, engine = FolderStorage(tmp_path / "out", field="spec.output"), ToyEngine(0, 1)
    checkpoints = Checkpoints(storage, Alone(), fingerprint="f", keep=5)
    engine.take_step()
    checkpoints.save(engine, 1, {}, kinds=(WEIGHT,), is_last=True)
    checkpoints.finish()
    resumed, again = ToyEngine(0, 1), Checkpoints(storage, Alone(), fingerprint="f", keep=5)
    assert again.restore(resumed, tmp_path / "log", total_steps=STEPS) == 1
    assert resumed.values()["weight/norm"] == engine.values()["weight/norm"]


def save_steps(storage: FolderStorage, group: Any, best: dict[int, int], *, keep: int, first: int = 1) -> ToyEngine:
    """A checkpoint after each step of `best`, which says which step was the best by then."""
    engine = ToyEngine(group.rank, group.world_size)
    checkpoints = Checkpoints(storage, group, fingerprint="f", keep=keep, keep_best=True)
    for step, lowest in best.items():
        engine.take_step()
        if step >= first:
            checkpoints.save(engine, step, {}, best=lowest)
    checkpoints.finish()
    return engine


@pytest.mark.parametrize(
    ("best", "keep", "kept"),
    [
        pytest.param({1: 1, 2: 1, 3: 1, 4: 1}, 1, [4, 1], id="an old one"),
        pytest.param({1: 1, 2: 2, 3: 3, 4: 4}, 1, [4], id="the newest"),
        pytest.param({1: 1, 2: 1, 3: 1, 4: 4}, 2, [4, 3, 1], id="that of an attempt that falls back to step 3"),
        pytest.param({1: 1, 2: 2, 3: 2, 4: 2}, 2, [4, 3, 2], id="a newer best replaces an older one"),
    ],
)
def test_the_best_checkpoint_of_each_kept_one_is_kept(
    best: dict[int, int], keep: int, kept: list[int], tmp_path: Path
) -> None:
    storage = FolderStorage(tmp_path / "out", field="spec.output")
    save_steps(storage, Alone(), best, keep=keep)
    assert stored_checkpoints(storage) == [f"checkpoints/step-{step:08d}" for step in kept]


@pytest.mark.parametrize("next_world_size", [1, 2, 3])
def test_the_weights_of_an_earlier_step_come_back_on_any_number_of_ranks(next_world_size: int, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "out", field="spec.output")
    together(2, lambda group: save_steps(storage, group, {1: 1, 2: 2, 3: 2, 4: 2}, keep=1))
    wanted = ToyEngine(0, 1)
    wanted.take_step()
    wanted.take_step()

    def load(group: Any) -> ToyEngine:
        engine = ToyEngine(group.rank, group.world_size)
        checkpoints = Checkpoints(storage, group, fingerprint="f", keep=1, keep_best=True)
        assert checkpoints.restore(engine, tmp_path / "log" / str(group.rank), total_steps=STEPS) == 4
        assert not checkpoints.use_weights(engine, 3), "it is not kept"
        assert checkpoints.use_weights(engine, 2)
        return engine

    state = state_of(together(next_world_size, load))
    for name in SHAPES:
        assert state[f"{WEIGHT}/{name}"] == state_of([wanted])[f"{WEIGHT}/{name}"]


def test_a_damaged_best_checkpoint_changes_nothing_on_any_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = FolderStorage(tmp_path / "out", field="spec.output")
    together(2, lambda group: save_steps(storage, group, {1: 1, 2: 1}, keep=1))
    path = next((tmp_path / "out" / "checkpoints" / "step-00000001").glob("rank-00001-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    def load(group: Any) -> bool:
        engine = ToyEngine(group.rank, group.world_size)
        checkpoints = Checkpoints(storage, group, fingerprint="f", keep=1, keep_best=True)
        checkpoints.restore(engine, tmp_path / "log" / str(group.rank), total_steps=STEPS)
        before = state_of([engine])
        found = checkpoints.use_weights(engine, 1)
        assert state_of([engine]) == before
        return found

    assert together(2, load) == [False, False]
    assert "checkpoints/step-00000001 is broken and its weights are not used" in caplog.text
