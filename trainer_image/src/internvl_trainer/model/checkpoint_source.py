"""A checkpoint directory's config and tensors, read without executing any of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import InternVLConfig

from ..errors import UserError
from .checkpoint_format import (
    Architecture,
    UnsupportedArchitecture,
    native_config,
    read_architecture,
    to_native,
    to_upstream,
)
from .checkpoint_format.config import DEFAULT_TEMPLATES, language_kind
from .checkpoint_format.files import CheckpointError, TensorEntry, list_tensors, read_json, shape_tensors
from .checkpoint_format.shards import Piece, upstream_pieces

CONFIG_FILE = "config.json"
KEPT_FOLDER = "upstream"
"""Folder of a native directory with upstream's own files of the same model, config.json among them."""
_UNKNOWN_TOKEN = -1  # the image token's id, which only the tokenizer knows


@dataclass(frozen=True)
class Source:
    """A readable checkpoint directory.

    Attributes:
        is_native: the directory is in transformers' format, not in upstream's.
        config: the native model's config.
        architecture: an Architecture, or a retrieval model's RetrievalArchitecture.
        upstream_config: upstream's config.json; None for a native directory that does not keep it.
        entries: every tensor of the directory.
        rename: turns a stream of the directory's tensors into the native model's.
    """

    directory: Path
    is_native: bool
    config: Any
    architecture: Any
    upstream_config: dict[str, Any] | None
    entries: list[TensorEntry]
    rename: Callable[[Iterable[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]

    def pieces(self) -> list[Piece]:
        """The native tensors with their place in the files."""
        if not self.is_native:
            return list(upstream_pieces(self.entries, self.architecture))
        return [Piece(name, entry) for entry in self.entries for name, _ in self.rename(shape_tensors([entry]))]

    def to_stored(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The inverse of `rename`: the native model's tensors under the directory's names and in its layout."""
        if not self.is_native:
            yield from to_upstream(tensors, self.architecture)
            return
        names = {piece.name: piece.entry.name for piece in self.pieces()}
        for name, tensor in tensors:
            yield names[name], tensor


def open_checkpoint(directory: Path, entries: list[TensorEntry] | None = None) -> Source:
    """The source in a chat model's directory, from config.json and weight headers. Raises CheckpointError.

    Args:
        entries: the tensors, where they are not in the directory.
    """
    native, architecture, upstream = _read_config(directory)
    is_native = read_json(directory / CONFIG_FILE, missing="").get("model_type") == "internvl"
    rename = _current_names if is_native else partial(to_native, architecture=architecture)
    found = list_tensors(directory) if entries is None else entries
    return Source(directory, is_native, native, architecture, upstream, found, rename)


def describe_checkpoint(directory: str | Path) -> Architecture:
    """The architecture in a chat model's config.json; no weight file is read. Raises CheckpointError."""
    return _read_config(Path(directory))[1]


def _read_config(directory: Path) -> tuple[InternVLConfig, Architecture, dict[str, Any] | None]:
    """Native config, architecture, and upstream's config.json when the directory has it."""
    path = directory / CONFIG_FILE
    config = read_json(path, missing="give the directory of a checkpoint")
    if "qllama_config" in config:
        message = "is a retrieval model (InternVL 1.0); name it as one: model.name InternVL-14B-224px"
        raise CheckpointError("UnsupportedArchitecture", message, str(path))
    if config.get("model_type") == "internvl":
        with readable_config(path):
            return _read_native_config(directory)
    with readable_config(path):
        return native_config(config, _UNKNOWN_TOKEN), read_architecture(config), config


@contextmanager
def readable_config(path: Path) -> Iterator[None]:
    """Turn errors in the values of config.json, also from transformers' own checks, into a CheckpointError."""
    again = "copy config.json from the model's repository again"
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        message = f"{error.args[0]} is missing from llm_config; {again}"
        raise CheckpointError("UnsupportedArchitecture", message, str(path)) from error
    except ValueError as error:
        raise CheckpointError("UnsupportedArchitecture", _first_line(error), str(path)) from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, StrictDataclassError) as error:
        message = f"a value cannot be used ({_first_line(error)}); {again}"
        raise CheckpointError("InvalidConfig", message, str(path)) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def _read_native_config(directory: Path) -> tuple[InternVLConfig, Architecture, dict[str, Any] | None]:
    config = InternVLConfig.from_pretrained(directory)
    kept = directory / KEPT_FOLDER / CONFIG_FILE
    upstream = read_json(kept, missing="") if kept.exists() else None
    return config, read_architecture(upstream) if upstream else _native_architecture(config, directory), upstream


def _native_architecture(config: Any, directory: Path) -> Architecture:
    try:
        kind = language_kind(config.text_config.model_type, "text_config.model_type")
    except UnsupportedArchitecture as error:
        raise CheckpointError("UnsupportedArchitecture", str(error), str(directory / CONFIG_FILE)) from error
    return Architecture(
        kind=kind,
        heads=config.text_config.num_attention_heads,
        kv_heads=config.text_config.num_key_value_heads,
        select_layer=config.vision_feature_layer,
        pixel_shuffle_version="v2",
        image_size=config.vision_config.image_size[0],
        downsample_ratio=config.downsample_ratio,
        patch_size=config.vision_config.patch_size[0],
        template="internvl2_5" if kind == "qwen2" else DEFAULT_TEMPLATES[kind],
    )


# Prefixes in files written by transformers before 4.53 and since.
_OLD_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def _current_names(stream: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stream:
        old = next((prefix for prefix in _OLD_PREFIXES if name.startswith(prefix)), None)
        yield (_OLD_PREFIXES[old] + name.removeprefix(old) if old else name), tensor
