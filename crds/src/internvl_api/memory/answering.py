"""How many GPUs hold one copy of a chat model that answers: in the evaluation stages, and in `internvl-trainer chat`.

The language model's layers are split over the GPUs of a copy; everything else is whole on each. Half a model on two
GPUs of 80 GB is slower than two models, so a copy takes as few GPUs as can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvl_api.models.catalogue import find_model
from internvl_api.quantity import gib

if TYPE_CHECKING:
    from internvl_api.run_config import RunConfig
    from internvl_api.spec import InternVLFineTuneSpec

WEIGHTS_FRACTION = 0.8
"""Most of a GPU's memory that weights may take; keys and values, pictures and CUDA need the rest."""


@dataclass(frozen=True)
class Answering:
    """Inputs of the decision to split a model over GPUs.

    Attributes:
        whole: bytes of weights that every GPU of a copy has: vision tower, projector, embeddings and head.
        split: bytes of weights that the GPUs of a copy share: the language model's layers.
        intermediate: channels of an MLP.
        splits: False for a model that one GPU must hold.
    """

    whole: int
    split: int
    heads: int
    kv_heads: int
    intermediate: int
    splits: bool = True

    def bytes_on_each(self, gpus: int) -> int:
        """Bytes of weights on each GPU of a copy."""
        return self.whole + -(-self.split // gpus)

    def can_split(self, gpus: int) -> bool:
        """Whether so many GPUs get equal shares; GPUs may share a key-value head."""
        even = self.heads % gpus == 0 and self.intermediate % gpus == 0
        return gpus == 1 or (self.splits and even and (self.kv_heads % gpus == 0 or gpus % self.kv_heads == 0))


def gpus_of_a_copy(model: Answering, gpus: int, gpu_memory: int) -> int | None:
    """The smallest divisor of `gpus` (of one machine) whose GPUs hold a copy of the model; None when none does."""
    return next((k for k in _splits(model, gpus) if model.bytes_on_each(k) <= _room(gpu_memory)), None)


def most_gpus_of_a_copy(model: Answering, gpus: int) -> int:
    """The largest divisor of `gpus` (of one machine) that can share the model."""
    return _splits(model, gpus)[-1]


def _splits(model: Answering, gpus: int) -> list[int]:
    """The divisors of `gpus` that can share the model, in their order; 1 is always one."""
    return [k for k in range(1, gpus + 1) if gpus % k == 0 and model.can_split(k)]


def _room(gpu_memory: int) -> int:
    """Bytes of a GPU that weights may take."""
    return int(WEIGHTS_FRACTION * gpu_memory)


def not_possible(model: Answering, gpus: int, gpu_memory: int) -> str:
    """Why no number of a machine's GPUs holds a copy, and the next step."""
    most = most_gpus_of_a_copy(model, gpus)
    why = "" if model.splits else " (DoRA cannot be computed by several GPUs together)"
    return (
        f"a copy of the model that answers needs {gib(model.bytes_on_each(most))} of weights on each of {most} "
        f"GPUs{why}, found room for {gib(_room(gpu_memory))} ({WEIGHTS_FRACTION:.0%} of "
        f"{gib(gpu_memory)}); use more GPUs a worker or larger ones, or leave the tasks out"
    )


def answering_of(run: InternVLFineTuneSpec | RunConfig) -> Answering | None:
    """The model that a run evaluates; None when it is not in the catalogue."""
    model = find_model(run.model.name) if run.model.name else None
    if model is None:
        return None
    size = 2 if run.training.precision == "bf16" else 4
    language, lora = model.language, run.lora if run.method == "lora" else None
    adapters = language.lora_parameters(lora.language_rank) if lora else 0
    return Answering(
        whole=size * (model.parameters - language.linear_parameters),
        split=size * (language.linear_parameters + adapters),
        heads=language.heads,
        kv_heads=language.kv_heads,
        intermediate=language.intermediate,
        splits=not (lora and lora.dora),
    )


def evaluation_note(run: InternVLFineTuneSpec | RunConfig, gpu_memory: int) -> str | None:
    """What an evaluation needs of GPUs, as a sentence; None without one, and for models outside the catalogue."""
    model = answering_of(run) if run.evaluation.tasks else None
    if model is None:
        return None
    gpus = run.processes_per_worker
    copy = gpus_of_a_copy(model, gpus, gpu_memory)
    if copy is None:
        return f"Evaluation is not possible: {not_possible(model, gpus, gpu_memory)}."
    weights = gib(model.bytes_on_each(copy))
    copies = run.world_size // copy
    together = "one GPU each" if copy == 1 else f"{copy} GPUs each"
    return f"Evaluation: {copies} copies of the model on {together}, with {weights} of weights a GPU."
