"""Adapters on disk in PEFT's format, and their merge into weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from .adapter_base import ADAPTER_CONFIG, AdapterBase
from .adapters import ADAPTER, Adaptable, add_lora, fused_projections, lora_layers, name_prefix
from .checkpoint_format import Architecture
from .checkpoint_format.files import CheckpointError, StoredTensors
from .checkpoint_format.shards import Part, cut
from .checkpoint_format.tensors import match_native
from .language_shard import LanguageShard

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", ADAPTER_CONFIG
_PREFIX = "base_model.model."  # PEFT's prefix of the wrapped model's names
_MAGNITUDE = ".lora_magnitude_vector"


def adapter_state_dict(model: Adaptable, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Adapter tensors under PEFT's file names, on the CPU; a shared A is written once for each of its layers.

    Args:
        state: parameter name to full tensor, for a model whose parameters are partitioned. A shared parameter needs
            one of its names.
    """
    shared = {id(layer): query for query, *others in fused_projections(model) for layer in others}
    names = {id(layer): name for name, layer in lora_layers(model)}
    prefix = name_prefix(model)
    tensors = {}
    for name, layer in lora_layers(model):
        for part, parameter in _own_parameters(layer):
            source = f"{prefix}{name}.{part}"
            is_repeated = id(layer) in shared and part.startswith("lora_A")
            if state is not None and is_repeated and source not in state:
                source = f"{prefix}{names[id(shared[id(layer)])]}.{part}"
            tensor = parameter if state is None else state[source]
            tensors[file_name(f"{name}.{part}")] = tensor.detach().cpu().clone()
    return tensors


def save_adapter(
    model: Adaptable,
    directory: str | Path,
    state: Mapping[str, torch.Tensor] | None = None,
    base: AdapterBase | None = None,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json in PEFT's format; the latter records `base`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state_dict(model, state), directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = model.native.peft_config[ADAPTER].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    plain |= {"inference_mode": True, **(base.in_config(model.native) if base else {})}
    (directory / CONFIG_FILE).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def load_adapter(
    model: Adaptable, directory: str | Path, *, trainable: bool = False, shard: LanguageShard | None = None
) -> None:
    """Add a saved adapter to a model that has none.

    Args:
        shard: of the language model, that this process has; None: it has the whole model.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensors do not fit the model.
    """
    adapter = read_adapter(directory)
    if shard is not None:
        _refuse_dora(adapter, directory)
    add_lora(model, adapter.config, seed=0, share=adapter.shares_a(model.architecture))
    wanted = dict(_file_names(model))
    if wrong := set(wanted) ^ set(adapter.tensors):
        raise CheckpointError(
            "AdapterMismatch",
            f"{len(wrong)} tensors are on one side only, such as {min(wrong)}; is this adapter for this model?",
            str(directory),
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            tensor = adapter.tensors[name]
            own = cut(tensor, _part(name, shard)) if shard else tensor
            parameter.copy_(own).requires_grad_(trainable)


def _refuse_dora(adapter: Adapter, directory: str | Path) -> None:
    """DoRA scales a row by its norm, of which a process with some columns knows only a part."""
    if adapter.config.use_dora:
        message = "DoRA cannot be computed by several GPUs together; use GPUs that hold the whole model, or merge first"
        raise CheckpointError("DoraNotSplit", message, str(directory))


def _part(name: str, shard: LanguageShard) -> Part | None:
    """Of lora_B the rows that its weight's share has, of lora_A the columns."""
    module, _, matrix = name.removeprefix(_PREFIX).partition(".lora_")
    part = shard.part(f"{module}.weight")
    return part if part is not None and part.dim == (1 if matrix.startswith("A") else 0) else None


def file_name(name: str) -> str:
    """The name in PEFT's file of an adapter parameter of the native model."""
    return _peft_name(_PREFIX + name.replace(f".{ADAPTER}", ""))


def _peft_name(name: str) -> str:
    """PEFT writes DoRA's magnitudes without the `.weight` that they have in memory, and reads both forms."""
    return name.removesuffix(".weight") if name.endswith(f"{_MAGNITUDE}.weight") else name


def _file_names(model: Adaptable) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, layer in lora_layers(model):
        for part, parameter in _own_parameters(layer):
            yield file_name(f"{name}.{part}"), parameter


def _own_parameters(layer: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The adapter parameters of an adapted layer, without the layer's own."""
    return ((part, parameter) for part, parameter in layer.named_parameters() if part.startswith("lora_"))


class LoraPair(NamedTuple):
    """The change of one weight: weight + scaling x up @ down; DoRA then scales each row to its magnitude."""

    down: torch.Tensor  # (lora_rank, in), PEFT's lora_A
    up: torch.Tensor  # (out, lora_rank), PEFT's lora_B
    scaling: float
    magnitude: torch.Tensor | None  # (out,)


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: PEFT's config, and its tensors by PEFT's file names, read on access."""

    config: LoraConfig
    tensors: Mapping[str, torch.Tensor]

    def shares_a(self, architecture: Architecture) -> bool:
        """Whether the parts of each fused projection share one A, as in adapters of this project and of upstream."""
        groups: dict[str, list[torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            module, _, part = name.removeprefix(_PREFIX).partition(".lora_A")
            if part:
                match = match_native(f"{module}.weight", architecture.kind)
                groups.setdefault(match.upstream_name, []).append(tensor)
        return all(torch.equal(first, other) for first, *others in groups.values() for other in others)

    @property
    def modules(self) -> set[str]:
        """Native modules that have a LoRA pair."""
        return {name.removeprefix(_PREFIX).partition(".lora_A")[0] for name in self.tensors if ".lora_A" in name}

    def pair(self, module: str) -> LoraPair | None:
        """The LoRA pair of a native module; None when it has no adapter."""
        key = f"{_PREFIX}{module}"
        if f"{key}.lora_A.weight" not in self.tensors:
            return None
        down, up = self.tensors[f"{key}.lora_A.weight"], self.tensors[f"{key}.lora_B.weight"]
        return LoraPair(down, up, self._alpha(module) / down.shape[0], self.tensors.get(f"{key}{_MAGNITUDE}"))

    def merge(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight merged with its adapter, computed in fp32 and rounded once to the weight's dtype."""
        if weight.is_meta or (pair := self.pair(module)) is None:
            return weight
        merged = torch.addmm(weight.float(), pair.up.float(), pair.down.float(), alpha=pair.scaling)
        if pair.magnitude is not None:
            merged *= (pair.magnitude.float() / merged.norm(dim=1)).unsqueeze(1)
        return merged.to(weight.dtype)

    def _alpha(self, module: str) -> float:
        for pattern, alpha in (self.config.alpha_pattern or {}).items():
            if re.fullmatch(pattern, module):
                return float(alpha)
        return float(self.config.lora_alpha)


def read_adapter(directory: str | Path) -> Adapter:
    """The adapter in a directory. Raises CheckpointError when a file is missing or damaged."""
    directory = Path(directory)
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        if not (directory / file).exists():
            raise CheckpointError(
                "FileMissing", f"{file} is missing; give an adapter's directory", str(directory / file)
            )
    try:
        tensors = StoredTensors(directory / WEIGHTS_FILE, _peft_name)
        config = LoraConfig.from_pretrained(str(directory))
    except (ValueError, TypeError) as error:
        raise CheckpointError("InvalidAdapter", f"cannot be read ({error}); copy it again", str(directory)) from error
    return Adapter(config, tensors)
