"""A retrieval model loaded from a checkpoint directory in upstream's layout. Safetensors only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from internvl_trainer.model.attention import choose_attention
from internvl_trainer.model.checkpoint_format import to_native
from internvl_trainer.model.checkpoint_format.files import TensorEntry, list_tensors, read_json
from internvl_trainer.model.checkpoint_source import CONFIG_FILE, Source, readable_config
from internvl_trainer.model.parameters import CPU, empty_parameters, fill_parameters
from internvl_trainer.retrieval.architecture import RetrievalArchitecture, read_retrieval_architecture
from internvl_trainer.retrieval.attention import QLLAMA_REFERENCE, VISION_REFERENCE
from internvl_trainer.retrieval.model import RetrievalModel


@dataclass(frozen=True)
class LoadedRetrievalModel:
    """A model with its config.json, changed only where loading changed the model."""

    model: RetrievalModel
    architecture: RetrievalArchitecture
    upstream_config: dict[str, Any]

    @property
    def image_size(self) -> int:
        """Pixels of an image's side."""
        return self.architecture.image_size


def load_retrieval_model(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
    attn_implementation: str | None = None,
    image_size: int | None = None,
    drop_path_rate: float = 0.0,
    hard_negatives: bool = False,
    zero3_config: Mapping[str, Any] | None = None,
    entries: list[TensorEntry] | None = None,
    is_skipped: Callable[[str], bool] = lambda _: False,
) -> LoadedRetrievalModel:
    """The model of a directory in upstream's layout (model_type internvl with a qllama_config).

    Args:
        attn_implementation: of the vision tower and of QLLaMA. None uses `choose_attention` on a GPU, and
            upstream's exact arithmetic on the processor.
        image_size: pixels of an image's side; another size than the checkpoint's resizes the position embeddings.
        hard_negatives: matching trains on mined negatives rather than on the batch's random ones.
        zero3_config, entries, is_skipped: as for `load_chat_model`.

    Raises:
        CheckpointError: with the file and the next step.
    """
    source = open_retrieval_checkpoint(directory, image_size, entries)
    architecture = source.architecture
    _set_attention(architecture, attn_implementation, device, dtype)
    with empty_parameters(zero3_config, dtype):
        model = RetrievalModel(architecture)
    fill_parameters(model, source, dtype, device=device, partitioned=zero3_config is not None, is_skipped=is_skipped)
    if zero3_config is None:
        model.to(device)  # buffers
    if drop_path_rate > 0:
        model.set_drop_path(drop_path_rate)
    model.hard_negatives = hard_negatives
    return LoadedRetrievalModel(
        model, architecture, changed_config(source.upstream_config or {}, architecture.image_size)
    )


def open_retrieval_checkpoint(
    directory: str | Path, image_size: int | None = None, entries: list[TensorEntry] | None = None
) -> Source:
    """The source in a retrieval model's directory, from config.json and weight headers. Raises CheckpointError.

    Args:
        entries: the tensors, where they are not in the directory.
    """
    directory = Path(directory)
    config = _read_config(directory)
    architecture = _architecture(config, directory, image_size)
    rename = partial(to_native, architecture=architecture)  # type: ignore[arg-type]
    found = list_tensors(directory) if entries is None else entries
    return Source(directory, False, architecture, architecture, config, found, rename)


def describe_retrieval_checkpoint(directory: str | Path, image_size: int | None = None) -> RetrievalArchitecture:
    """The architecture in config.json; no weight file is read. Raises CheckpointError."""
    directory = Path(directory)
    return _architecture(_read_config(directory), directory, image_size)


def _set_attention(
    architecture: RetrievalArchitecture, asked: str | None, device: torch.device, dtype: torch.dtype
) -> None:
    if asked is None and device.type == "cpu":
        vision, qllama = VISION_REFERENCE, QLLAMA_REFERENCE
    else:
        vision = qllama = asked or choose_attention(device, dtype, flat=False)
    architecture.vision._attn_implementation = vision
    architecture.qllama._attn_implementation = qllama


def _read_config(directory: Path) -> dict[str, Any]:
    return read_json(directory / CONFIG_FILE, missing="give the directory of a checkpoint")


def _architecture(config: Mapping[str, Any], directory: Path, image_size: int | None) -> RetrievalArchitecture:
    with readable_config(directory / CONFIG_FILE):
        return read_retrieval_architecture(config, image_size)


def changed_config(config: dict[str, Any], image_size: int) -> dict[str, Any]:
    """config.json for an image size, which upstream reads from force_image_size; vision_config keeps the original."""
    stored = config.get("force_image_size") or config["vision_config"].get("image_size")
    return config if stored == image_size else {**config, "force_image_size": image_size}
