"""A base model that changed between training and what follows is noticed, and only then."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts import sources
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.errors import UserError
from internvl_trainer.model.base_identity import check_base, describe_base
from ivft_cluster.s3 import S3Server
from safetensors.torch import load_file, save_file
from trainer.artifacts.conftest import bucket, s3_env
from trainer.runs import GOLDEN, make_config

__all__ = ["bucket", "s3_env"]


def copy_base(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("*.npz")
    return Path(shutil.copytree(GOLDEN / "checkpoints" / "qwen2", folder / "base", ignore=ignored))


def change_one_weight(base: Path) -> None:
    """The same names, shapes and sizes: only the numbers tell."""
    tensors = load_file(base / "model.safetensors")
    name = min(tensors)
    tensors[name] = torch.nextafter(tensors[name], torch.tensor(9.0))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def with_base(base: Path | str) -> RunConfig:
    return make_config("/out", str(base))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        pytest.param(change_one_weight, "model.safetensors differs", id="a weight in its last bit"),
        pytest.param(lambda base: (base / "vocab.json").unlink(), "vocab.json is gone", id="a tokenizer file gone"),
        pytest.param(lambda base: (base / "tokenizer.json").write_text("{}"), "tokenizer.json is new", id="a new file"),
    ],
)
def test_a_changed_base_is_refused_with_both_digests(
    change: Callable[[Path], object], difference: str, tmp_path: Path
) -> None:
    base = copy_base(tmp_path)
    recorded = describe_base(with_base(base))
    change(base)
    now = describe_base(with_base(base))
    with pytest.raises(UserError) as caught:
        check_base(with_base(base), recorded)
    assert caught.value.reason == "BaseModelChanged"
    assert str(caught.value) == (
        f"{base}: the base model is not the one that was trained on: its digest is {now['digest']}, at training it was "
        f"{recorded['digest']} ({difference}); put the old files back, or train again with another output"
    )


def test_what_does_not_decide_the_model_may_change(tmp_path: Path) -> None:
    base = copy_base(tmp_path)
    recorded = describe_base(with_base(base))
    (base / "README.md").write_text("a better model card")
    (base / "modeling_internvl_chat.py").write_text("# formatted")
    (base / "checkpoints").mkdir()
    (base / "checkpoints" / "model.safetensors").write_bytes(b"somebody's output")
    (base / "pytorch_model.bin").write_bytes(b"never read")
    (base / "model.safetensors").touch()
    check_base(with_base(base), recorded)


@pytest.mark.integration
def test_a_changed_base_in_a_bucket_is_refused(bucket: str, s3_env: S3Server) -> None:
    sources._open.cache_clear()
    storage = open_storage(f"{bucket}/model", field="spec.model.source")
    for name in ("config.json", "model.safetensors", "README.md"):
        storage.write(name, name.encode())
    config = with_base(storage.uri)
    recorded = describe_base(config)
    storage.write("README.md", b"another")
    check_base(config, recorded)
    storage.write("model.safetensors", b"MODEL.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors differs") as caught:
        check_base(config, recorded)
    assert caught.value.reason == "BaseModelChanged"
