"""Checkpoint directories: safetensors, checked by their headers and read shard by shard."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ...errors import UserError
from ...git_lfs import POINTER
from ...json_text import InvalidJson, parse_json

if TYPE_CHECKING:
    from .remote import RemoteTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}
"""safetensors' name of each dtype that weights may have."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointError(UserError):
    """The checkpoint directory cannot be used as it is."""


@dataclass(frozen=True)
class TensorEntry:
    """A stored tensor's file, shape and dtype, without its data."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def open(self) -> torch.Tensor | RemoteTensor:
        """The tensor, mapped: only what is used of it is read."""
        return _map_tensor(self)


def read_json(path: Path, *, missing: str) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError; `missing` is the next step when the file does not exist."""
    try:
        value = parse_json(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("FileMissing", f"{path.name} is missing; {missing}", str(path)) from error
    except UnicodeDecodeError as error:
        raise CheckpointError("InvalidJson", f"not valid UTF-8 (byte {error.start})", str(path)) from error
    except InvalidJson as error:
        raise CheckpointError(
            "InvalidJson", f"{error.message}; copy the file from the model's repository again", str(path)
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError("InvalidJson", f"expected a JSON object, found {type(value).__name__}", str(path))
    return value


def list_tensors(directory: Path) -> list[TensorEntry]:
    """Every tensor of a checkpoint, shard by shard, from the shards' headers alone.

    Raises:
        CheckpointError: no safetensors, a shard missing or cut short, a tensor that is not where the index says, a
            dtype that is no plain float.
    """
    index = directory / INDEX_FILE
    if index.exists():
        return _list_sharded(directory, index)
    if (directory / SINGLE_FILE).exists():
        return list(_read_header(directory / SINGLE_FILE))
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            "PickledWeights",
            f"only pickled weights found ({', '.join(pickled)}); pickle can run code and is never read. "
            f"Convert them to safetensors first",
            str(directory),
        )
    raise CheckpointError(
        "WeightsMissing", f"neither {SINGLE_FILE} nor {INDEX_FILE} is there; download the weights again", str(directory)
    )


def _list_sharded(directory: Path, index: Path) -> list[TensorEntry]:
    by_file = read_index(index)
    entries = []
    for position, file in enumerate(sorted(by_file), start=1):
        path = directory / file
        if not path.is_file():
            raise CheckpointError(
                "ShardMissing",
                f"shard {position} of {len(by_file)} is missing "
                f"({INDEX_FILE} lists {len(by_file[file])} tensors in it); download it again",
                str(path),
            )
        found = list(_read_header(path))
        if lost := by_file[file] - {entry.name for entry in found}:
            raise CheckpointError(
                "TensorMissing",
                f"{INDEX_FILE} says that tensor {min(lost)} is in this file, but it is not; download both again",
                str(path),
            )
        entries += [entry for entry in found if entry.name in by_file[file]]
    return entries


def read_index(index: Path) -> dict[str, set[str]]:
    """The names of the tensors of each file, from a checkpoint's index. Raises CheckpointError."""
    weight_map = read_json(index, missing="").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("InvalidIndex", "weight_map is missing or empty; download the file again", str(index))
    by_file: dict[str, set[str]] = defaultdict(set)
    for name, file in weight_map.items():
        if not is_shard_name(file):
            message = f"weight_map names {str(file)[:80]!r}; expected the name of a .safetensors file beside the index"
            raise CheckpointError("InvalidIndex", message, str(index))
        by_file[file].add(name)
    return by_file


def is_shard_name(name: object) -> bool:
    """Whether a name is that of a safetensors file, without a folder, that a file system can hold (255 bytes)."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and "/" not in name
        and name.isprintable()
        and len(name.encode()) <= 255
    )


def refuse_pointer(start: bytes, place: str) -> None:
    """Raises CheckpointError when the start of a file is that of a git-lfs pointer."""
    if start == POINTER:
        message = "is a git-lfs pointer, not the weights; run `git lfs pull` in the clone it comes from"
        raise CheckpointError("InvalidSafetensors", message, place)


def weight_dtype(tensor: str, dtype: str, place: str) -> torch.dtype:
    """The PyTorch dtype of a tensor in the file `place`. Raises CheckpointError for one that weights do not have."""
    if dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            "UnsupportedDtype",
            f"tensor {tensor} has dtype {dtype}; expected one of {', '.join(WEIGHT_DTYPES)}. Use the unquantized "
            "checkpoint",
            place,
        )
    return WEIGHT_DTYPES[dtype]


def _read_header(path: Path) -> Iterator[TensorEntry]:
    with path.open("rb") as file:
        refuse_pointer(file.read(len(POINTER)), str(path))
    try:
        with safe_open(path, framework="pt") as shard:
            names = shard.keys()
            slices = [(name, shard.get_slice(name)) for name in names]
            described = [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices]
    except SafetensorError as error:
        raise CheckpointError(
            "InvalidSafetensors",
            f"cannot be read as safetensors, {path.stat().st_size} bytes found ({error}); "
            f"the file is cut short or damaged, download it again",
            str(path),
        ) from error
    for name, shape, dtype in described:
        yield TensorEntry(name, path, shape, weight_dtype(name, dtype, str(path)))


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """One tensor, mapped from its file; its memory is freed with the tensor. A remote one is read."""
    stored = entry.open()
    return stored if isinstance(stored, torch.Tensor) else stored.whole()


def _map_tensor(entry: TensorEntry) -> torch.Tensor:
    with safe_open(entry.file, framework="pt") as shard:
        tensor: torch.Tensor = shard.get_tensor(entry.name)
    return tensor


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of one file, read on access. Raises CheckpointError for a damaged file.

    Args:
        rename: turns a name in the file into the key of the mapping.
    """

    def __init__(self, path: Path, rename: Callable[[str], str] = str) -> None:
        self._entries = {rename(entry.name): entry for entry in _read_header(path)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def shape_tensors(entries: list[TensorEntry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors in the order of `entries`, on the meta device: shapes without data."""
    for entry in entries:
        yield entry.name, torch.empty(entry.shape, dtype=entry.dtype, device="meta")
