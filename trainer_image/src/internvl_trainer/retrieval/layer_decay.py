"""Layer-wise learning rates, as optimizer groups.

The rate of a layer is the run's rate times decay^(distance below the heads). A scheduler must multiply it by each
group's `lr_scale`, as `train.engine.set_learning_rate` does. Upstream computes the same groups, but its DeepSpeed
scheduler then sets one rate for all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from internvl_trainer.retrieval.methods import TOWERS, UNREACHED
from internvl_trainer.retrieval.model import RetrievalModel

_LAYER = re.compile(r"\.layers?\.(\d+)\.")
_INPUTS = ("query_tokens", "logit_scale", "vision_tower.embeddings.", "qllama.model.embed_tokens.")


@dataclass(frozen=True)
class LayerDecay:
    """Factor from a layer's rate to that of the layer below; 1.0 is no decay, upstream's full fine-tuning uses 0.9."""

    vision: float = 0.9
    qllama: float = 0.9


@dataclass(frozen=True)
class GroupKey:
    """The optimizer group of a parameter.

    Attributes:
        depth: 0 for embeddings, queries and temperature; n + 1 for layer n; None for heads and final norms.
    """

    tower: str
    depth: int | None
    decays: bool

    @property
    def name(self) -> str:
        """The group's name, such as vision/layer 3/no weight decay."""
        place = "head" if self.depth is None else "inputs" if self.depth == 0 else f"layer {self.depth - 1}"
        return f"{self.tower}/{place}" + ("" if self.decays else "/no weight decay")


def group_key(name: str, dimensions: int) -> GroupKey:
    """The group of a retrieval model's parameter, from its name and number of dimensions.

    Matrices decay. Vectors and the temperature do not, nor do parameters without a gradient, which weight decay would
    shrink.
    """
    tower = next(tower for tower, prefixes in TOWERS.items() if name.startswith(prefixes))
    layer = _LAYER.search(name)
    depth = int(layer[1]) + 1 if layer else 0 if name.startswith(_INPUTS) else None
    return GroupKey(tower, depth, decays=dimensions > 1 and name not in UNREACHED)


def learning_rate_scale(key: GroupKey, layers: Mapping[str, int], decay: LayerDecay) -> float:
    """decay^(layers + 1 - depth): 1 for heads, decay for the last layer, decay^(layers + 1) for the inputs."""
    if key.depth is None:
        return 1.0
    factor: float = getattr(decay, key.tower)
    return factor ** (layers[key.tower] + 1 - key.depth)


def layer_groups(model: RetrievalModel, weight_decay: float, decay: LayerDecay) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, from inputs to heads: name, params, lr_scale, weight_decay."""
    layers = {
        "vision": model.architecture.vision.num_hidden_layers,
        "qllama": model.architecture.qllama.num_hidden_layers,
    }
    members: dict[GroupKey, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = group_key(name, len(getattr(parameter, "ds_shape", parameter.shape)))
            members.setdefault(key, []).append(parameter)
    return [
        {
            "name": key.name,
            "params": members[key],
            "lr_scale": learning_rate_scale(key, layers, decay),
            "weight_decay": weight_decay if key.decays else 0.0,
        }
        for key in sorted(members, key=lambda key: (key.tower, math.inf if key.depth is None else key.depth))
    ]


def describe_groups(groups: Sequence[Mapping[str, Any]], learning_rate: float) -> str:
    """One line for each group: name, learning rate, weight decay and number of tensors."""
    width = max(len(group["name"]) for group in groups)
    return "\n".join(
        f"{group['name']:<{width}}  lr {learning_rate * group['lr_scale']:.4e} (x{group['lr_scale']:.4f})  "
        f"weight decay {group['weight_decay']:g}  {len(group['params'])} tensors"
        for group in groups
    )
