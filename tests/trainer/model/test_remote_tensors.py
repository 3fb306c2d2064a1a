"""Weights read at their source: equal to the downloaded ones to the last bit, and no more bytes than needed."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden import KINDS, checkpoint, load
from internvl_trainer.artifacts.storage import StoredFile
from internvl_trainer.model.adapter_base import weights_digest
from internvl_trainer.model.adapters import Freeze, learns
from internvl_trainer.model.checkpoint_format.files import CheckpointError, list_tensors
from internvl_trainer.model.checkpoint_format.remote import in_order, list_remote_tensors
from internvl_trainer.model.checkpoint_source import open_checkpoint
from internvl_trainer.model.load import load_chat_model
from internvl_trainer.model.parameters import list_values
from trainer.train.export_worker import split


class Files:
    """A RangeSource over a folder; `read` counts the bytes that were asked for."""

    uri = "s3://models/base"

    def __init__(self, folder: Path) -> None:
        self.folder, self.read = folder, 0
        self._mutex = threading.Lock()

    def list(self) -> Iterator[StoredFile]:
        return (StoredFile(path.name, path.stat().st_size, "etag") for path in self.folder.iterdir())

    def read_range(self, file: StoredFile, start: int, end: int) -> bytes:
        with self._mutex:
            self.read += end - start
        return (self.folder / file.key).read_bytes()[start:end]


def small_files(kind: str, folder: Path) -> Path:
    """The checkpoint without its weights."""
    shutil.copytree(checkpoint(kind), folder, ignore=shutil.ignore_patterns("*.npz", "*.safetensors"))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_read_at_its_source_is_the_downloaded_one(kind: str, tmp_path: Path) -> None:
    """Also with position embeddings that are resized for other tiles."""
    directory, files = small_files(kind, tmp_path / "small"), Files(checkpoint(kind))
    entries = list_remote_tensors(files, directory)
    found = load_chat_model(directory, dtype=torch.float32, entries=entries, image_size=84).model
    wanted = dict(load(kind, image_size=84).model.named_parameters())
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, wanted.pop(name)), name
    assert not wanted
    digests = [weights_digest(open_checkpoint(directory, each)) for each in (entries, list_tensors(checkpoint(kind)))]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_read_every_byte_about_once(kind: str, tmp_path: Path) -> None:
    """A row that two ranks share is read twice; a fused tensor's rows are not read for another part of it."""
    files, native = Files(checkpoint(kind)), load(kind).model.native
    directory = small_files(kind, tmp_path / "small")
    entries = list_remote_tensors(files, directory)
    shapes = {name: parameter.shape for name, parameter in native.named_parameters()}
    read: list[int] = []
    shares: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    for rank in range(4):
        files.read = 0
        for values in list_values(open_checkpoint(directory, entries), shapes):
            size = -(-shapes[values.name].numel() // 4)
            shares[values.name].append(values.flat(rank * size, min((rank + 1) * size, shapes[values.name].numel())))
        read.append(files.read)
    for name, parameter in native.named_parameters():
        assert torch.equal(torch.cat(shares[name]).float(), parameter.flatten()), name
    total = sum(entry.nbytes for entry in entries)
    assert all(total / 5 < each < total / 3 for each in read)
    assert sum(read) < 1.05 * total


def test_what_a_checkpoint_has_is_not_read(tmp_path: Path) -> None:
    files, directory = Files(checkpoint("internlm2")), small_files("internlm2", tmp_path / "small")
    entries = list_remote_tensors(files, directory)
    freeze, files.read = Freeze(vision=True), 0
    model = load_chat_model(
        directory, dtype=torch.float32, entries=entries, is_skipped=lambda name: learns(name, freeze)
    ).model
    wanted = dict(load("internlm2").model.named_parameters())
    for name, parameter in model.named_parameters():
        expected = wanted[name] if ".vision_tower." in name else torch.zeros_like(parameter)
        assert torch.equal(parameter, expected), name
    frozen = [entry.nbytes for entry in entries if entry.name.startswith("vision_model.")]
    assert files.read == sum(frozen) < sum(entry.nbytes for entry in entries) / 2


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    split(checkpoint("qwen2"), tmp_path / "remote")
    directory = small_files("qwen2", tmp_path / "small")
    index = tmp_path / "remote" / "model.safetensors.index.json"
    shutil.copy(index, directory)
    entries = list_remote_tensors(Files(tmp_path / "remote"), directory)
    assert sorted(entry.name for entry in entries) == sorted(entry.name for entry in list_tensors(checkpoint("qwen2")))
    (tmp_path / "remote" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 3 weight files are missing, such as model-00002-of-00003"):
        list_remote_tensors(Files(tmp_path / "remote"), directory)
    placed = json.loads(index.read_text())["weight_map"]
    moved = {"weight_map": dict.fromkeys(placed, "model-00001-of-00003.safetensors")}
    (directory / index.name).write_text(json.dumps(moved))
    with pytest.raises(CheckpointError, match="is in this file, but it is not"):
        list_remote_tensors(Files(tmp_path / "remote"), directory)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_reads_give_their_results_in_order_and_few_are_ahead(threads: int) -> None:
    begun: list[int] = []
    results = in_order([lambda number=number: begun.append(number) or number for number in range(20)], threads)
    for wanted in range(20):
        assert next(results) == wanted
        assert len(begun) <= wanted + 1 + threads


def test_the_error_of_a_read_comes_out() -> None:
    def fail() -> int:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(in_order([fail, fail, fail], 2))
