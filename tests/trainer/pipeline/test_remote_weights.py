"""Weights that lie elsewhere are checked by their starts and lengths before a GPU is requested."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from golden import KINDS, checkpoint
from internvl_trainer.errors import UserError
from internvl_trainer.model.checkpoint_format import header
from internvl_trainer.model.checkpoint_format.files import list_tensors
from internvl_trainer.model.checkpoint_format.header import check_header
from internvl_trainer.stages import checkpoint_checks
from internvl_trainer.stages.checkpoint_checks import check_weights
from safetensors.torch import load_file, save_file

SOURCE = "s3://models/base"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234567890\n"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A remote checkpoint of two shards; `tmp_path` has what preflight downloads of it."""
    folder = tmp_path / "remote"
    shutil.copytree(checkpoint("qwen2"), folder, ignore=shutil.ignore_patterns("*.npz", "*.safetensors"))
    tensors = load_file(checkpoint("qwen2") / "model.safetensors")
    shards = {"model-1.safetensors": sorted(tensors)[::2], "model-2.safetensors": sorted(tensors)[1::2]}
    stored = {}
    for name, members in shards.items():
        save_file({member: tensors[member] for member in members}, tmp_path / name)
        stored[name] = (tmp_path / name).read_bytes()
    index = {"weight_map": {member: name for name, members in shards.items() for member in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    stored["model.safetensors.index.json"] = b"{}"
    monkeypatch.setattr(checkpoint_checks, "list_sizes", lambda *_, **__: {n: len(data) for n, data in stored.items()})
    monkeypatch.setattr(checkpoint_checks, "read_start", lambda _, name, length, **__: stored[name][:length])
    return stored


def check(tmp_path: Path) -> None:
    check_weights(tmp_path / "remote", SOURCE)


def test_whole_weights_pass(files: dict[str, bytes], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_tells_what_the_file_has(kind: str) -> None:
    data = (checkpoint(kind) / "model.safetensors").read_bytes()
    found = check_header("model.safetensors", len(data), lambda length: data[:length], SOURCE)
    wanted = [(entry.name, entry.shape, entry.dtype) for entry in list_tensors(checkpoint(kind))]
    assert sorted((entry.name, entry.shape, entry.dtype) for entry, _ in found) == sorted(wanted)


def with_header(data: bytes, change: Callable[[dict[str, dict[str, object]]], object]) -> bytes:
    """The file with another header."""
    length = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + length])
    change(document)
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def first(document: dict[str, dict[str, object]]) -> dict[str, object]:
    return document[min(document)]


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (lambda _: POINTER, "git lfs pull"),
    "long pointer": (lambda _: POINTER + b"x" * 2000, "is a git-lfs pointer"),
    "empty": (lambda _: b"", "git lfs pull"),
    "half": (lambda data: data[: len(data) // 2], "it is cut short or damaged, copy it again"),
    "one byte short": (lambda data: data[:-1], "cut short or damaged"),
    "longer": (lambda data: data + b"x", "cut short or damaged"),
    "html": (lambda _: b"<html>" * 500, "its header would have"),
    "zeros": (lambda data: bytes(len(data)), "its header is no JSON"),
    "a header that is a list": (lambda _: (2000).to_bytes(8, "little") + b"[]".ljust(2000), "is no object"),
    "nested": (lambda _: (2000).to_bytes(8, "little") + b"[" * 2000, "its header is no JSON"),
    "no offsets": (lambda data: with_header(data, lambda d: first(d).pop("data_offsets")), "does not describe"),
    "another shape": (lambda data: with_header(data, lambda d: first(d).update(shape=[7])), "does not describe"),
    "a negative shape": (
        lambda data: with_header(data, lambda d: first(d).update(shape=[-1])),
        "does not describe",
    ),
    "no object": (lambda data: with_header(data, lambda d: d.update({min(d): 7})), "does not describe"),  # type: ignore[dict-item]
    "a tensor gone": (lambda data: with_header(data, lambda d: d.pop(sorted(d)[1])), "overlap or leave gaps"),
    "4 bits": (lambda data: with_header(data, lambda d: first(d).update(dtype="F4")), "Use the unquantized checkpoint"),
}


@pytest.mark.parametrize("shard", ["model-1.safetensors", "model-2.safetensors"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_named(files: dict[str, bytes], tmp_path: Path, case: str, shard: str) -> None:
    change, message = BROKEN[case]
    files[shard] = change(files[shard])
    with pytest.raises(UserError) as refused:
        check(tmp_path)
    assert refused.value.reason in ("InvalidSafetensors", "UnsupportedDtype")
    assert message in str(refused.value)
    assert shard in str(refused.value)


def test_a_tensor_in_another_file_than_the_index_says(files: dict[str, bytes], tmp_path: Path) -> None:
    files["model-1.safetensors"] = files["model-2.safetensors"]
    with pytest.raises(UserError) as refused:
        check(tmp_path)
    assert refused.value.reason == "TensorMissing"
    assert str(refused.value).startswith(f"{SOURCE}/model-1.safetensors: ")


def test_only_the_header_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_FIRST_READ", 64)
    data = (checkpoint("qwen2") / "model.safetensors").read_bytes()
    asked: list[int] = []

    def read(length: int) -> bytes:
        asked.append(length)
        return data[:length]

    check_header("model.safetensors", len(data), read, SOURCE)
    assert asked == [64, 8 + int.from_bytes(data[:8], "little")]
    data, asked = (200 << 20).to_bytes(8, "little") + bytes(1000), []
    with pytest.raises(UserError, match="its header would have 209715200 bytes"):
        check_header("model.safetensors", 1 << 40, read, SOURCE)
    assert asked == [64], "a length from a stranger is bounded before it is asked for"
