"""Learning rates that fall with depth, as optimizer groups whose rate really is their own.

The deeper below the heads a layer is, the less it moves: its rate is the run's times decay^distance. A scheduler must
multiply each group's `lr_scale` in (`train.engine.set_learning_rate` does). Upstream computes the same groups, but its
DeepSpeed scheduler then sets one rate for all of them.
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
    """The factor from a layer to the one below it; the guides' full fine-tuning takes 0.9 for both, 1.0 is none."""

    vision: float = 0.9
    qllama: float = 0.9


@dataclass(frozen=True)
class GroupKey:
    """Where a parameter belongs.

    Attributes:
        depth: 0 for embeddings, queries and temperature; n + 1 for layer n; None for heads and final norms.
    """

    tower: str
    depth: int | None
    decays: bool

    @property
    def name(self) -> str:
        """Such as vision/layer 3/no weight decay."""
        place = "head" if self.depth is None else "inputs" if self.depth == 0 else f"layer {self.depth - 1}"
        return f"{self.tower}/{place}" + ("" if self.decays else "/no weight decay")


def group_key(name: str, dimensions: int) -> GroupKey:
    """Where a parameter of the retrieval model belongs, by its name and number of dimensions.

    Matrices decay; vectors and the temperature do not, nor does what no gradient reaches, which weight decay alone
    would shrink.
    """
    tower = next(tower for tower, prefixes in TOWERS.items() if name.startswith(prefixes))
    layer = _LAYER.search(name)
    depth = int(layer[1]) + 1 if layer else 0 if name.startswith(_INPUTS) else None
    return GroupKey(tower, depth, decays=dimensions > 1 and name not in UNREACHED)


def learning_rate_scale(key: GroupKey, layers: Mapping[str, int], decay: LayerDecay) -> float:
    """decay^(layers + 1 - depth): 1 for heads, decay^1 for the last layer, decay^(layers + 1) for the inputs."""
    if key.depth is None:
        return 1.0
    factor: float = getattr(decay, key.tower)
    return factor ** (layers[key.tower] + 1 - key.depth)


def layer_groups(model: RetrievalModel, weight_decay: float, decay: LayerDecay) -> list[dict[str, Any]]:
    """Optimizer groups of what learns, from the inputs up: name, params, lr_scale, weight_decay."""
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
    """A line for each group: its name, its rate when the run's is `learning_rate`, its weight decay."""
    width = max(len(group["name"]) for group in groups)
    return "\n".join(
        f"{group['name']:<{width}}  lr {learning_rate * group['lr_scale']:.4e} (x{group['lr_scale']:.4f})  "
        f"weight decay {group['weight_decay']:g}  {len(group['params'])} tensors"
        for group in groups
    )
