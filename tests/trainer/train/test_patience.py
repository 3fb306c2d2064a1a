"""Storage that is away for a moment costs no attempt, at whichever of its calls a checkpoint has got to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from internvl_trainer.artifacts.output_layout import stored_checkpoints
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.errors import Unavailable
from internvl_trainer.train import checkpoint as checkpoint_module
from internvl_trainer.train.checkpoint import Checkpoints
from trainer.contexts import Alone

CALLS = ("list", "delete", "write", "upload")
WHOLE = "checkpoints/step-00000005.000001/manifest.json"


class Sometimes(FolderStorage):
    """The `number`-th call of all that go to storage does not arrive."""

    def __init__(self, root: Path, number: int) -> None:
        super().__init__(root, field="spec.output")
        self.calls, self._number = 0, number

    def __getattribute__(self, name: str) -> Any:
        if name in CALLS:
            self.calls += 1
            if self.calls == self._number:
                raise Unavailable("StorageUnavailable", f"{name}: away")
        return super().__getattribute__(name)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group of one process; its engine has nothing to store."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    monkeypatch.setattr(checkpoint_module, "local_fragments", lambda *_: [])
    monkeypatch.setattr(checkpoint_module, "trainable_shapes", lambda _: {})
    return Alone()


def save(storage: FolderStorage, group: Any, journal: Path) -> Checkpoints:
    checkpoints = Checkpoints(storage, group, fingerprint="f", keep=1)
    for step in (5, 10):
        checkpoints.save(None, step, {"metrics.jsonl": journal})
    checkpoints.finish()
    return checkpoints


def test_what_a_killed_attempt_stored_makes_room_first(alone: Any, tmp_path: Path) -> None:
    class Full(FolderStorage):
        def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
            assert [file.key for file in self.list("checkpoints/")] == [
                "checkpoints/step-00000005.000001/manifest.json"
            ]
            super().upload(path, key, sha256=sha256)

    journal = tmp_path / "metrics.jsonl"
    journal.write_text("{}")
    storage = Full(tmp_path / "output", field="spec.output")
    storage.write(WHOLE, b"whole")
    storage.write("checkpoints/step-00000005.000002/rank-00000-000.safetensors", b"of a killed attempt")
    checkpoints = Checkpoints(storage, alone, fingerprint="f", keep=1, epoch=3)
    checkpoints.save(None, 5, {"metrics.jsonl": journal})
    checkpoints.finish()
    assert stored_checkpoints(storage) == ["checkpoints/step-00000005.000003"]


def test_a_checkpoint_waits_for_storage_at_each_of_its_calls(alone: Any, tmp_path: Path) -> None:
    journal = tmp_path / "metrics.jsonl"
    journal.write_text("{}")
    undisturbed = Sometimes(tmp_path / "undisturbed", 0)
    save(undisturbed, alone, journal)
    assert undisturbed.calls > 10
    for number in range(1, undisturbed.calls + 1):
        storage = Sometimes(tmp_path / str(number), number)
        newest = save(storage, alone, journal).newest
        assert newest is not None
        assert newest.step == 10
        assert stored_checkpoints(FolderStorage(tmp_path / str(number), field="spec.output")) == [
            "checkpoints/step-00000010"
        ]
