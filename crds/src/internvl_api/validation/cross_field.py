"""Fields of a spec that are each well formed and do not go together; nothing is accepted that would do nothing."""

from collections.abc import Iterator
from typing import NamedTuple

from internvl_api.models.catalogue import CATALOGUE, hub_repository
from internvl_api.models.kinds import RETRIEVAL_MODELS
from internvl_api.spec import InternVLFineTuneSpec


class Contradiction(NamedTuple):
    """The field to edit, and what is wrong with it; `reason` is the condition's."""

    field: str
    message: str
    reason: str = "InvalidSpec"


def contradictions(spec: InternVLFineTuneSpec) -> Iterator[Contradiction]:
    """All of them, in the order in which a user would look."""
    yield from _model(spec)
    yield from _method(spec)
    yield from _steps(spec)
    yield from _evaluation(spec)
    yield from _addresses(spec)
    if len(set(spec.merge.formats)) < len(spec.merge.formats):
        yield Contradiction("spec.merge.formats", f"found {spec.merge.formats[0]} twice; name each format once")


def _model(spec: InternVLFineTuneSpec) -> Iterator[Contradiction]:
    """A source that is known to be another model than the one named: its template would be wrong."""
    name, source = spec.model.name, spec.model.source or ""
    repository = source.removeprefix("hf://").partition("@")[0].rstrip("/")
    known = {hub_repository(model): model for model in (*CATALOGUE, *RETRIEVAL_MODELS)}
    other = known.get(repository) if source.startswith("hf://") else None
    if name is not None and other is not None and other != name:
        whose = f" (from recipe {spec.recipe})" if spec.recipe else ""
        text = f"found {source}, which is {other}, but model.name is {name}{whose}; set model.name to {other}"
        yield Contradiction("spec.model.source", text)


def _method(spec: InternVLFineTuneSpec) -> Iterator[Contradiction]:
    lora, freeze = spec.lora, spec.training.freeze
    if spec.method == "lora" and lora.language_rank == lora.vision_rank == 0:
        text = "found 0, and visionRank 0: nothing would learn; give one of them a rank, such as 16"
        yield Contradiction("spec.lora.languageRank", text, "LoraRankMissing")
    if spec.method == "full" and freeze.vision and freeze.projector and freeze.language:
        text = "found true for vision, projector and language: nothing would learn; set one to false, or method to lora"
        yield Contradiction("spec.training.freeze", text, "NothingToTrain")


def _steps(spec: InternVLFineTuneSpec) -> Iterator[Contradiction]:
    warmup, most = spec.training.warmup_steps, spec.training.max_steps
    if warmup and most is not None and warmup >= most:
        text = (
            f"warmupSteps {warmup} must be below maxSteps {most}, else the full learning rate is never reached; lower "
            "warmupSteps"
        )
        yield Contradiction("spec.training.warmupSteps", text)


def _evaluation(spec: InternVLFineTuneSpec) -> Iterator[Contradiction]:
    evaluation = spec.evaluation
    if evaluation.baseline and not evaluation.tasks:
        text = "baseline is true, but evaluation.tasks is empty; add tasks, or remove baseline"
        yield Contradiction("spec.evaluation.baseline", text)
    if evaluation.every_steps is not None and not spec.data.validation:
        text = (
            f"everySteps {evaluation.every_steps} needs data.validation, which is empty; add a dataset there, or "
            "remove everySteps"
        )
        yield Contradiction("spec.evaluation.everySteps", text)


def _addresses(spec: InternVLFineTuneSpec) -> Iterator[Contradiction]:
    for field, address in [("spec.output", spec.output), *spec.sources()]:
        if ".." in address.split("/"):
            yield Contradiction(field, f"found {address!r}, expected an address without '..'; write it out")
    for field, address in spec.sources():
        place = address.rstrip("/")
        if place == spec.output:
            text = f"found {spec.output!r}, which {field} reads from; name a folder for the results alone"
            yield Contradiction("spec.output", text)
