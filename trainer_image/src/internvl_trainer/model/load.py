"""From a checkpoint directory to a model in memory; nothing in the directory is ever executed."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from .chat_model import ChatModel
from .checkpoint_format import Architecture, UnsupportedArchitecture, native_config, read_architecture, to_native
from .checkpoint_format.config import DEFAULT_TEMPLATES, language_kind
from .checkpoint_format.files import (
    CheckpointError,
    TensorEntry,
    list_tensors,
    read_json,
    read_tensors,
    shape_tensors,
)
from .checkpoint_format.shards import Piece, upstream_pieces
from .checkpoint_format.tensors import UnknownTensor, match_native
from .tokenizer import CONTEXT_TOKEN, load_tokenizer

__all__ = ["CheckpointError", "LoadedModel", "load_chat_model"]

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
KEPT_FOLDER = "upstream"
"""In a native directory: upstream's own files of the same model, config.json among them, kept for the way back."""
_LATER = -1  # the image token's id, which the tokenizer knows
POSITION_EMBEDDINGS = "vision_tower.embeddings.position_embeddings"


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that was learnt about it on the way in.

    Attributes:
        model: parameters in `dtype` on the CPU (or partitioned, under ZeRO-3).
        tokenizer: with the checkpoint's own special tokens; `<IMG_CONTEXT>` is `model.native.config.image_token_id`.
        upstream_config: upstream's config.json as it was read; None for a native directory that did not keep it.
        architecture: what the tensor mapping needs for the way back.
        kind: language-model family: qwen2 | internlm2 | llama | phi3.
        template: name of the conversation template that the checkpoint was trained with.
        image_size: pixels of a tile's side; context_tokens: `<IMG_CONTEXT>` tokens for each tile.
        attn_implementation: what runs: flash_attention_2 | sdpa | eager.
        is_native: the directory is in transformers' format, not in upstream's.
    """

    model: ChatModel
    tokenizer: PreTrainedTokenizerBase
    upstream_config: dict[str, Any] | None
    architecture: Architecture
    kind: str
    template: str
    image_size: int
    context_tokens: int
    attn_implementation: str
    is_native: bool


@dataclass(frozen=True)
class Source:
    """A directory understood: its native config, and its tensors under native names.

    Attributes:
        is_native: written by transformers, not by upstream.
        config: what the native model is built from.
        rename: a stream of the directory's tensors to the native model's.
    """

    directory: Path
    is_native: bool
    config: Any
    architecture: Any
    upstream_config: dict[str, Any] | None
    entries: list[TensorEntry]
    rename: Callable[[Iterable[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]

    def pieces(self) -> list[Piece]:
        """The native tensors, and where each is."""
        if not self.is_native:
            return list(upstream_pieces(self.entries, self.architecture))
        return [Piece(name, entry) for entry in self.entries for name, _ in self.rename(shape_tensors([entry]))]


def load_chat_model(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str | None = None,
    image_size: int | None = None,
    drop_path_rate: float = 0.0,
    pixel_shuffle_version: str | None = None,
    select_layer: int | None = None,
    zero3_config: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Read an upstream-format (model_type internvl_chat) or native hf-format (internvl) directory.

    Args:
        image_size: another tile size than the checkpoint's resizes the position embeddings.
        pixel_shuffle_version, select_layer: override what the checkpoint's config says.
        zero3_config: the DeepSpeed config (a dict with zero_optimization.stage 3), after deepspeed.init_distributed():
            parameters are partitioned as they are made and filled one by one from rank 0, so no process ever holds the
            whole model. None otherwise.

    Raises:
        CheckpointError: with the file and what to do.
    """
    directory = Path(directory)
    source = open_checkpoint(directory)
    tokenizer = load_tokenizer(directory)
    changes: dict[str, Any] = {
        "image_size": image_size,
        "pixel_shuffle_version": pixel_shuffle_version,
        "select_layer": select_layer,
    }
    architecture = replace(source.architecture, **{key: value for key, value in changes.items() if value is not None})
    config: Any = settle_config(source.config, architecture, tokenizer, dtype)
    attention = attn_implementation or choose_attention()
    config._attn_implementation = attention
    logger.info("attention implementation: %s", attention)

    with empty_parameters(zero3_config, dtype):
        native = InternVLForConditionalGeneration(config)
    fill_parameters(native, source, dtype, partitioned=zero3_config is not None)
    model = ChatModel(native, architecture)
    if drop_path_rate > 0:
        model.set_drop_path(drop_path_rate)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        upstream_config=source.upstream_config,
        architecture=architecture,
        kind=architecture.kind,
        template=architecture.template,
        image_size=architecture.image_size,
        context_tokens=architecture.context_tokens,
        attn_implementation=attention,
        is_native=source.is_native,
    )


def settle_config(
    config: Any, architecture: Architecture, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> InternVLConfig:
    """A copy of the native config with what it does not know by itself."""
    config = copy.deepcopy(config)
    config.image_token_id = int(tokenizer.get_vocab()[CONTEXT_TOKEN])
    config.vision_config.image_size = (architecture.image_size, architecture.image_size)
    config.image_seq_length = architecture.context_tokens
    config.vision_feature_layer = architecture.select_layer
    config.dtype = config.vision_config.dtype = config.text_config.dtype = dtype
    settled: InternVLConfig = config
    return settled


def check_checkpoint(source: Source, config: InternVLConfig) -> None:
    """Raises CheckpointError unless the directory has exactly the tensors that `config` describes."""
    with torch.device("meta"), no_init_weights():
        native = InternVLForConditionalGeneration(config)
    _check(source, {name: parameter.shape for name, parameter in native.named_parameters()}, resizable=False)


def describe_checkpoint(directory: str | Path) -> Architecture:
    """What a checkpoint's config.json says, without reading a tensor. Raises CheckpointError."""
    return _read_config(Path(directory))[1]


def choose_attention() -> str:
    """flash_attention_2 where its package and a GPU are there, else sdpa."""
    has_flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
    return "flash_attention_2" if has_flash else "sdpa"


def open_checkpoint(directory: Path) -> Source:
    """What a directory holds, from config.json and the weights' headers. Raises CheckpointError."""
    native, architecture, upstream = _read_config(directory)
    is_native = read_json(directory / CONFIG_FILE, missing="").get("model_type") == "internvl"
    rename = _current_names if is_native else partial(to_native, architecture=architecture)
    return Source(directory, is_native, native, architecture, upstream, list_tensors(directory), rename)


def _read_config(directory: Path) -> tuple[InternVLConfig, Architecture, dict[str, Any] | None]:
    """Native config, architecture, and upstream's config.json where it is known."""
    path = directory / CONFIG_FILE
    config = read_json(path, missing="give the directory of a checkpoint")
    if "qllama_config" in config:
        message = "is a retrieval model (InternVL 1.0); name it as one: model.name InternVL-14B-224px"
        raise CheckpointError("UnsupportedArchitecture", message, str(path))
    if config.get("model_type") == "internvl":
        return _read_native_config(directory)
    try:
        return native_config(config, _LATER), read_architecture(config), config
    except (UnsupportedArchitecture, KeyError, ValueError) as error:
        raise CheckpointError("UnsupportedArchitecture", _config_problem(error), str(path)) from error


def _config_problem(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing from llm_config; copy config.json from the model's repository again"
    return f"{error}"


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


@contextmanager
def empty_parameters(zero3_config: Mapping[str, Any] | None, dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside have parameters without data: on the meta device, or partitioned over ranks (ZeRO-3)."""
    with no_init_weights(), _placement(zero3_config, dtype):
        yield


def _placement(zero3_config: Mapping[str, Any] | None, dtype: torch.dtype) -> Any:
    if zero3_config is None:
        from accelerate import init_empty_weights  # type: ignore[import-untyped]

        return init_empty_weights(include_buffers=False)
    import deepspeed  # type: ignore[import-untyped]
    import torch._dynamo  # a first import of it under zero.Init fails, as its classes get patched half-way

    # The dtype goes in through the config: zero.Init's own argument is ignored on processors without fp16.
    precision = {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    return deepspeed.zero.Init(config_dict_or_path={**zero3_config, **precision})


def fill_parameters(native: nn.Module, source: Source, dtype: torch.dtype, *, partitioned: bool) -> None:
    """Give every parameter its tensor, checking names and shapes before any data is read."""
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in native.named_parameters()}
    _check(source, shapes)
    lead = not partitioned or torch.distributed.get_rank() == 0
    stream = source.rename(read_tensors(source.entries) if lead else shape_tensors(source.entries))
    for name, tensor in stream:
        if name.endswith(POSITION_EMBEDDINGS) and tuple(tensor.shape) != tuple(shapes[name]):
            tensor = resize_position_embeddings(tensor, shapes[name][1])
        if partitioned:
            _fill_partitioned(native.get_parameter(name), tensor, lead)
        else:
            _assign(native, name, nn.Parameter(tensor.to(dtype, copy=True)))


def _assign(native: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(native.get_submodule(owner), leaf, parameter)


def _fill_partitioned(parameter: nn.Parameter, tensor: torch.Tensor, lead: bool) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        if lead:
            parameter.copy_(tensor)


def _check(source: Source, shapes: Mapping[str, torch.Size], *, resizable: bool = True) -> None:
    """Every parameter has a tensor of its shape, and no tensor is left over."""
    missing = set(shapes)
    for entry in source.entries:
        try:
            renamed = list(source.rename(shape_tensors([entry])))
        except UnknownTensor as error:
            raise CheckpointError(
                "UnknownTensor", f"{error}; is config.json of this model?", str(entry.file)
            ) from error
        for name, tensor in renamed:
            if name not in shapes:
                raise CheckpointError(
                    "UnknownTensor",
                    f"tensor {entry.name} has no place in the model that config.json describes (as {name}); "
                    f"check that config.json and the weights belong together",
                    str(entry.file),
                )
            missing.discard(name)
            fits = tuple(tensor.shape) == tuple(shapes[name])
            if not fits and not (resizable and _is_resizable(name, tensor, shapes[name])):
                raise CheckpointError(
                    "ShapeMismatch",
                    f"tensor {entry.name} has shape {list(entry.shape)}; config.json asks for {name} to be "
                    f"{list(shapes[name])}, found {list(tensor.shape)}. "
                    f"Check that config.json and the weights belong together",
                    str(entry.file),
                )
    if missing:
        name = min(missing)
        wanted = match_native(name, source.architecture.kind).upstream_name if not source.is_native else name
        raise CheckpointError(
            "TensorMissing",
            f"tensor {wanted} is in no weight file ({len(missing)} of {len(shapes)} are missing); "
            f"download the weights again",
            str(source.directory),
        )


def _is_resizable(name: str, tensor: torch.Tensor, shape: torch.Size) -> bool:
    return name.endswith(POSITION_EMBEDDINGS) and tensor.ndim == 3 and tensor.shape[2] == shape[2]


def resize_position_embeddings(embeddings: torch.Tensor, positions: int) -> torch.Tensor:
    """(1, 1 + n^2, C) to (1, positions, C): bicubic on the square grid in fp32, as upstream; the class token stays."""
    grid = embeddings[:, 1:].float()
    old, new = int(grid.shape[1] ** 0.5), int((positions - 1) ** 0.5)
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(embeddings.dtype)
    return torch.cat([embeddings[:, :1], grid], dim=1)
