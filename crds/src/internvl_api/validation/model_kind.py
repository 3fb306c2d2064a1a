"""Chat models learn from conversations, retrieval models from pairs: fields that the one has and the other has not."""

from collections.abc import Iterator

from internvl_api.models.kinds import RETRIEVAL_MODELS
from internvl_api.recipes.files import load_recipe
from internvl_api.spec import Freeze, InternVLFineTuneSpec, Retrieval
from internvl_api.spec.evaluation import TASK_DEFAULTS, EvaluationTask

Misplaced = tuple[str, str]
"""Field, and what is wrong with it."""


def misplaced(spec: InternVLFineTuneSpec) -> Iterator[Misplaced]:
    """What a spec asks for that its model cannot do."""
    retrieves = spec.model.name in RETRIEVAL_MODELS
    yield from _of_recipe(spec, retrieves=retrieves)
    yield from _of_tasks(spec)
    yield from _for_retrieval(spec) if retrieves else _for_chat(spec)


def _of_recipe(spec: InternVLFineTuneSpec, *, retrieves: bool) -> Iterator[Misplaced]:
    """First of all: what a recipe of the other kind brings along, the user never wrote."""
    if spec.recipe is None or spec.model.name is None:
        return
    its = load_recipe(spec.recipe)["model"]["name"]
    if (its in RETRIEVAL_MODELS) != retrieves:
        kinds = ("a retrieval model", "a chat model") if retrieves else ("a chat model", "a retrieval model")
        text = f"found {spec.recipe}, which is for {its}, {kinds[1]}; {spec.model.name} is {kinds[0]}, take another"
        yield "spec.recipe", f"{text} recipe or none"


def _of_tasks(spec: InternVLFineTuneSpec) -> Iterator[Misplaced]:
    for name, task in spec.evaluation.tasks.items():
        field = f"spec.evaluation.tasks.{name}.format"
        pairs = task.task.startswith("retrieval")
        if pairs and task.format is None and TASK_DEFAULTS[task.task].format is None:
            yield field, "found none; say whether the annotation is flickr or coco"
        if pairs:
            yield from _asks_nothing(name, task)
        if not pairs and task.format is not None:
            yield field, f"found {task.format}; only retrieval tasks have one, leave it out"


def _asks_nothing(name: str, task: EvaluationTask) -> Iterator[Misplaced]:
    """Fields of questions and answers, which comparing pictures with captions has no use for."""
    for field in ("prompt", "min_new_tokens", "max_new_tokens", "beams", "max_dynamic_patch"):
        if (value := getattr(task, field)) is not None:
            path = f"spec.evaluation.tasks.{name}.{EvaluationTask.model_fields[field].alias}"
            yield path, f"found {value}; {task.task} compares pictures with captions and asks nothing, leave it out"


def _for_retrieval(spec: InternVLFineTuneSpec) -> Iterator[Misplaced]:
    what = f"{spec.model.name} is a retrieval model"
    for field, form in _formats(spec):
        if form == "chat":
            yield field, f"found chat; {what}, which learns from flickr or coco"
    for name, task in spec.evaluation.tasks.items():
        if task.task in ("vqa", "grounding"):
            yield f"spec.evaluation.tasks.{name}.task", f"found {task.task}; {what}, which captions and retrieves"
    if spec.data.meta is not None:
        yield "spec.data.meta", f"found {spec.data.meta}; {what}, name its files under data.train"
    if spec.training.packing.enabled:
        yield "spec.training.packing.enabled", f"found true; {what}, whose rows are pairs and are not packed"
    yield from _without_meaning(spec)
    if spec.lora.quantize is not None:
        yield "spec.lora.quantize", f"found {spec.lora.quantize}; {what}, leave it out"
    if "hf" in spec.merge.formats:
        yield "spec.merge.formats", "found hf; transformers has no such model, use upstream"


def _without_meaning(spec: InternVLFineTuneSpec) -> Iterator[Misplaced]:
    """What only conversations have; nothing is accepted that would do nothing."""
    training = spec.training
    what = f"{spec.model.name} is a retrieval model"
    if spec.model.template is not None:
        yield "spec.model.template", f"found {spec.model.template}; {what} without conversations, leave it out"
    if training.freeze != Freeze():
        yield "spec.training.freeze", f"found settings; {what}, whose method (full, lora or head) says what learns"
    if training.loss_weighting != "token":
        yield "spec.training.lossWeighting", f"found {training.loss_weighting}; {what}, each of whose pairs weighs 1"
    if training.group_by_length:
        yield "spec.training.groupByLength", f"found true; {what}, whose pairs are drawn at random"
    for section, datasets in (("train", spec.data.train), ("validation", spec.data.validation)):
        for name, dataset in datasets.items():
            if dataset.data_augment:
                field = f"spec.data.{section}.{name}.dataAugment"
                yield field, f"found true; {what}, whose training pictures are always cropped and mirrored"
    if spec.run_policy.on_out_of_memory == "halveMicroBatch":
        message = f"found halveMicroBatch; {what}, where a smaller micro batch is another task: its pairs compete"
        yield "spec.runPolicy.onOutOfMemory", f"{message}; use fail"


def _for_chat(spec: InternVLFineTuneSpec) -> Iterator[Misplaced]:
    only = f"only a retrieval model ({', '.join(RETRIEVAL_MODELS)})"
    for field, form in _formats(spec):
        if form != "chat":
            yield field, f"found {form}; {only} learns from pairs, use chat"
    for name, task in spec.evaluation.tasks.items():
        field = f"spec.evaluation.tasks.{name}"
        if task.task.startswith("retrieval"):
            yield f"{field}.task", f"found {task.task}; {only} does that"
        if task.beams is not None:
            yield f"{field}.beams", f"found {task.beams}; {only} searches with beams, leave it out"
    if spec.method == "head":
        yield "spec.method", f"found head; {only} has heads, use full or lora"
    if spec.retrieval != Retrieval():
        yield "spec.retrieval", f"found settings; {only} has them, leave it out"


def _formats(spec: InternVLFineTuneSpec) -> Iterator[tuple[str, str]]:
    for section, datasets in (("train", spec.data.train), ("validation", spec.data.validation)):
        for name, dataset in datasets.items():
            yield f"spec.data.{section}.{name}.format", dataset.format
