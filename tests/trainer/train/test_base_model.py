"""Which weights a pod of a training run reads, and where."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from golden import checkpoint
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts.ranges import RangesUnsupported
from internvl_trainer.artifacts.storage import StoredFile
from internvl_trainer.errors import UserError
from internvl_trainer.model.checkpoint_format.remote import RemoteEntry
from internvl_trainer.train import base_model
from internvl_trainer.train.base_model import BaseModel, fetch_base
from trainer.contexts import Alone, group_context
from trainer.model.test_remote_tensors import Files, small_files
from trainer.runs import make_config


class OfTwo(Alone):
    """Rank 0 of two that agree; `other` is what rank 1 says in place of rank 0's words."""

    def __init__(self, other: Any = None) -> None:
        super().__init__()
        self.world_size, self.other = 2, other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other if self.other and isinstance(value, dict) else value]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """An s3:// source; the folder `whole` stands for its download."""
    source, small = Files(checkpoint("qwen2")), small_files("qwen2", tmp_path / "small")
    monkeypatch.setattr(base_model, "open_ranges", lambda *_, **__: source)
    monkeypatch.setattr(base_model, "has_directory", lambda *_, **__: False)
    monkeypatch.setattr(
        base_model, "fetch_directory", lambda *_, weights=True, **__: checkpoint("qwen2") if weights else small
    )
    return source


def base_of(config: RunConfig, group: Alone | None = None) -> BaseModel:
    return fetch_base(group_context(config, "train", group or OfTwo()))


def config_of(output: Path, *, zero: int = 3, **sections: Any) -> RunConfig:
    """A run of two workers of one GPU each."""
    training = {"zeroStage": zero, **sections.pop("training", {})}
    return make_config(str(output), "qwen2", workers=2, training=training, **sections)


def is_remote(base: BaseModel) -> bool:
    return all(isinstance(entry, RemoteEntry) for entry in base.entries)


def store_checkpoint(output: Path) -> None:
    folder = output / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_pods_that_share_a_partitioned_model_read_their_parts(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert is_remote(base_of(config_of(tmp_path / "out")))
    assert "each pod reads" in caplog.text
    assert "of the base model's weights, at their source" in caplog.text


def test_a_pod_that_needs_the_whole_model_downloads_it(files: Files, tmp_path: Path) -> None:
    assert not is_remote(base_of(config_of(tmp_path / "out", zero=1)))
    grows = {"source": str(checkpoint("qwen2")), "resizeEmbeddings": True}
    assert not is_remote(base_of(config_of(tmp_path / "out", model=grows)))
    assert files.read == 0


def test_a_copy_in_the_cache_is_used(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "has_directory", lambda *_, **__: True)
    assert not is_remote(base_of(config_of(tmp_path / "out")))


@pytest.mark.parametrize("zero", [1, 3])
def test_a_full_run_that_resumes_reads_what_is_frozen(files: Files, tmp_path: Path, zero: int) -> None:
    store_checkpoint(tmp_path / "out")
    config = config_of(tmp_path / "out", zero=zero, training={"freeze": {"vision": True}})
    base = base_of(config)
    assert base.resumes
    assert is_remote(base)
    frozen = sum(entry.nbytes for entry in base.entries if entry.name.startswith("vision_model."))
    assert base.bytes_to_read() == frozen
    assert base.is_restored("lm_head.weight")
    assert not base.is_restored("model.vision_tower.layernorm.weight")


def test_an_adapter_that_resumes_reads_the_model(files: Files, tmp_path: Path) -> None:
    store_checkpoint(tmp_path / "out")
    base = base_of(config_of(tmp_path / "out", zero=1, method="lora"))
    assert not base.resumes
    assert not is_remote(base)


def test_a_server_without_ranges_is_named_and_the_whole_model_downloaded(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: StoredFile, *_: int) -> bytes:
        raise RangesUnsupported("RangesUnsupported", f"{file.key}: the server answers 200")

    monkeypatch.setattr(files, "read_range", refuse)
    with caplog.at_level(logging.INFO):
        assert not is_remote(base_of(config_of(tmp_path / "out")))
    assert "each pod downloads the whole base model: model.safetensors: the server answers 200" in caplog.text


def test_ranks_do_not_mix_ways_or_versions(files: Files, tmp_path: Path) -> None:
    refused = OfTwo({"problem": "no ranges on rank 1"})
    assert not is_remote(base_of(config_of(tmp_path / "out"), refused))
    newer = OfTwo({"versions": {"model.safetensors": "another etag"}})
    with pytest.raises(UserError, match="s3://models/base changed while it was read; try again"):
        base_of(config_of(tmp_path / "out"), newer)
