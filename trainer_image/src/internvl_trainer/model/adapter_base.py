"""The base model of an adapter: recorded in adapter_config.json, checked whenever an adapter is put on a model."""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internvl_trainer.model.checkpoint_format.files import CheckpointError, read_json, read_tensor
from internvl_trainer.model.checkpoint_format.shards import Piece
from internvl_trainer.model.checkpoint_format.tensors import DERIVED, match_native
from internvl_trainer.model.checkpoint_source import Source

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# PEFT's own fields about the base model. PEFT warns about keys that it does not know, so the digest goes into the
# mapping, where PEFT reads only the class and its module.
_SOURCE, _REVISION, _MAPPING = "base_model_name_or_path", "revision", "auto_mapping"
_DIGEST = "base_model_digest"
_SAMPLED_ROW = 4096  # values of a tensor's first row
_SAMPLED_VECTOR = 64
_PARALLEL_READS = 8  # of remote weights, each is a request
_SHOWN = 12  # digits of a digest in messages


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter belongs to.

    Attributes:
        source: its address, for people.
        digest: of its weights; see weights_digest.
    """

    source: str
    digest: str

    def in_config(self, native: Any) -> dict[str, Any]:
        """The fields of adapter_config.json; `native` is the model that was adapted."""
        kind = type(native)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__, _DIGEST: self.digest}
        name, revision = self.source, ""
        if self.source.startswith("hf://"):  # PEFT finds a model of the Hub by its name; the revision has its own field
            name, _, revision = self.source.removeprefix("hf://").partition("@")
        return {_SOURCE: name, _REVISION: revision or None, _MAPPING: mapping}


def identify_base(source: Source, address: str) -> AdapterBase:
    """What an adapter records about the checkpoint that it was trained on. `address`: where it came from."""
    return AdapterBase(str(address), weights_digest(source))


def weights_digest(source: Source) -> str:
    """Hex sha256 of a sample of every tensor, the same for every copy and format of a model.

    The sample is the start of each tensor's first row, rounded to bf16: other shards, another precision or
    transformers' format do not change it, training does. Takes seconds for the largest model.
    """
    pieces = [piece for piece in source.pieces() if _is_sampled(piece.name, source)]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        values = pool.map(lambda piece: _sample(piece, source.architecture), pieces)
        samples = {piece.name: value for piece, value in zip(pieces, values, strict=True)}
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(name.encode() + b"\0" + samples[name])
    return digest.hexdigest()


def check_adapter_base(adapter: Path, base: Source) -> None:
    """Raise CheckpointError AdapterMismatch for an adapter that was trained on another model than `base`.

    Only warns about an adapter that does not record its base, such as those of other tools.
    """
    recorded = read_adapter_base(adapter)
    if recorded is None:
        logger.warning(
            "%s does not record the model that it was trained on; it works on that model only, so check that it is %s",
            adapter / ADAPTER_CONFIG,
            base.directory,
        )
        return
    found = weights_digest(base)
    if found != recorded.digest:
        raise CheckpointError(
            "AdapterMismatch",
            f"the adapter was trained on {recorded.source} (weights {recorded.digest[:_SHOWN]}), and {base.directory} "
            f"has other weights ({found[:_SHOWN]}); use the model that the adapter was trained on",
            str(adapter),
        )


def read_adapter_base(adapter: Path) -> AdapterBase | None:
    """The base that an adapter's directory records; None for an adapter that records none."""
    config = read_json(adapter / ADAPTER_CONFIG, missing="give an adapter's directory")
    mapping = config.get(_MAPPING)
    digest = mapping.get(_DIGEST) if isinstance(mapping, dict) else None
    return AdapterBase(str(config.get(_SOURCE)), digest) if isinstance(digest, str) else None


def _is_sampled(name: str, source: Source) -> bool:
    """Whether both formats begin the tensor with the same row: of a fused projection, only its first part does."""
    return not DERIVED.search(name) and match_native(name, source.architecture.kind).native_names[0] == name


def _sample(piece: Piece, architecture: Any) -> bytes:
    if not piece.entry.shape:
        values = read_tensor(piece.entry)
    else:
        native = piece.make(lambda entry: torch.empty(entry.shape, device="meta"), architecture)
        rows = 1 if native.ndim > 1 else min(_SAMPLED_VECTOR, len(native))
        values = piece.entry.open()[:rows]
    values = values.flatten()[:_SAMPLED_ROW].to(torch.bfloat16)
    return bytes(values.view(torch.int16).numpy().tobytes())
