"""A run resumes only on the base model that its checkpoint was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.errors import UserError
from internvl_trainer.train import checkpoint as checkpoint_module
from internvl_trainer.train.checkpoint import Checkpoints
from trainer.contexts import Alone

BASE = {"source": "/models/base", "digest": "a1", "files": {"model.safetensors": "one", "config.json": "same"}}
OTHER = {"source": "/models/base", "digest": "b2", "files": {"model.safetensors": "two", "config.json": "same"}}


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that has nothing to store or to load."""
    for name, value in {"local_fragments": [], "trainable_shapes": {}}.items():
        monkeypatch.setattr(checkpoint_module, name, lambda *_, value=value: value)
    for name in ("set_optimizer_step", "use_restored_weights"):
        monkeypatch.setattr(checkpoint_module, name, lambda *_: None)


def checkpoints(folder: Path, base: dict[str, Any] | None) -> Checkpoints:
    return Checkpoints(FolderStorage(folder, field="spec.output"), Alone(), fingerprint="f", keep=1, base=base)


def saved(tmp_path: Path, base: dict[str, Any] | None) -> Path:
    journal = tmp_path / "metrics.jsonl"
    journal.write_text("{}")
    saving = checkpoints(tmp_path / "out", base)
    saving.save(None, 5, {"metrics.jsonl": journal})
    saving.finish()
    return tmp_path / "out"


def test_a_changed_base_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    output = saved(tmp_path, BASE)
    with pytest.raises(UserError) as refused:
        checkpoints(output, OTHER).restore(None, tmp_path / "scratch")
    assert refused.value.reason == "BaseModelChanged"
    assert str(refused.value) == (
        "/models/base: the base model is not the one that was trained on: its digest is b2, at training it was a1 "
        "(model.safetensors differs); put the old files back, or train again with another output"
    )


@pytest.mark.parametrize("recorded", [BASE, None], ids=["the same base", "a checkpoint of an older trainer"])
def test_other_checkpoints_are_resumed(tmp_path: Path, recorded: dict[str, Any] | None) -> None:
    assert checkpoints(saved(tmp_path, recorded), BASE).restore(None, tmp_path / "scratch") == 5
