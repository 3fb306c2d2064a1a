"""Fields that do not apply to the kind of model: chat models learn from conversations, retrieval models from pairs."""

from collections.abc import Iterator

from internvl_api.models.catalogue import SIDE_OF_TOKEN, find_model
from internvl_api.models.kinds import RETRIEVAL_MODELS
from internvl_api.recipes.files import load_recipe
from internvl_api.spec import Freeze, InternVLFineTuneSpec, Retrieval
from internvl_api.spec.evaluation import TASK_DEFAULTS, EvaluationTask
from internvl_api.validation.violations import Violation

_ONLY = f"only a retrieval model ({', '.join(RETRIEVAL_MODELS)})"


def wrong_kind(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Violations of a spec that asks for what its model cannot do."""
    retrieves = spec.model.name in RETRIEVAL_MODELS
    if wrong := _wrong_recipe(spec, retrieves=retrieves):  # everything else that is wrong comes from that recipe
        yield wrong
        return
    yield from _tasks(spec)
    yield from _for_retrieval(spec) if retrieves else _for_chat(spec)


def _wrong(field: str, message: str) -> Violation:
    return Violation(field, message, "NotForThisModel")


def _wrong_recipe(spec: InternVLFineTuneSpec, *, retrieves: bool) -> Violation | None:
    if spec.recipe is None or spec.model.name is None:
        return None
    model = load_recipe(spec.recipe)["model"]["name"]
    if (model in RETRIEVAL_MODELS) == retrieves:
        return None
    own, other = ("a retrieval model", "a chat model") if retrieves else ("a chat model", "a retrieval model")
    text = f"found {spec.recipe}, which is for {model}, {other}, but model.name is {spec.model.name}, {own}"
    return _wrong("spec.recipe", f"{text}; use another recipe or none")


def _tasks(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    for name, task in spec.evaluation.tasks.items():
        field = f"spec.evaluation.tasks.{name}.format"
        if not task.task.startswith("retrieval"):
            if task.format is not None:
                yield _wrong(field, f"found {task.format}; only retrieval tasks have a format, remove it")
            continue
        if task.format is None and TASK_DEFAULTS[task.task].format is None:
            yield _wrong(field, "found none; set the format of the annotation, flickr or coco")
        yield from _no_answers(name, task)


def _no_answers(name: str, task: EvaluationTask) -> Iterator[Violation]:
    """Settings of prompts and answers, which retrieval tasks do not have."""
    for field in ("prompt", "min_new_tokens", "max_new_tokens", "beams", "max_dynamic_patch"):
        if (value := getattr(task, field)) is not None:
            path = f"spec.evaluation.tasks.{name}.{EvaluationTask.model_fields[field].alias}"
            yield _wrong(path, f"found {value}; {task.task} compares images with captions without a prompt, remove it")


def _for_retrieval(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    what = f"{spec.model.name} is a retrieval model"
    for field, form in _formats(spec):
        if form not in ("flickr", "coco"):
            yield _wrong(field, f"found {form}; {what}, use flickr or coco")
    yield from _mixed(spec, what)
    for name, task in spec.evaluation.tasks.items():
        if task.task in ("vqa", "grounding"):
            field = f"spec.evaluation.tasks.{name}.task"
            yield _wrong(field, f"found {task.task}; {what}, use a caption or retrieval task")
    if spec.data.meta is not None:
        yield _wrong("spec.data.meta", f"found {spec.data.meta}; {what}, name its files under data.train")
    if spec.data.validation_meta is not None:
        found = spec.data.validation_meta
        yield _wrong("spec.data.validationMeta", f"found {found}; {what}, name its files under data.validation")
    if spec.training.packing.enabled:
        yield _wrong("spec.training.packing.enabled", f"found true; {what}, which does not pack its pairs; set false")
    yield from _without_effect(spec)
    if spec.lora.quantize is not None:
        yield _wrong("spec.lora.quantize", f"found {spec.lora.quantize}; {what}, remove it")
    if "hf" in spec.merge.formats:
        yield _wrong("spec.merge.formats", f"found hf; {what}, which transformers does not have; use upstream")


def _mixed(spec: InternVLFineTuneSpec, what: str) -> Iterator[Violation]:
    for name, dataset in spec.data.train.items():
        if dataset.weight is not None:
            yield _wrong(f"spec.data.train.{name}.weight", f"found {dataset.weight:g}; {what}, use repeatTime")
    if spec.data.mixing_temperature is not None:
        found = spec.data.mixing_temperature
        yield _wrong("spec.data.mixingTemperature", f"found {found:g}; {what}, remove it and use repeatTime")


def _without_effect(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Settings that have no effect on a retrieval model."""
    training = spec.training
    what = f"{spec.model.name} is a retrieval model"
    if spec.model.template is not None:
        yield _wrong("spec.model.template", f"found {spec.model.template}; {what} without conversations, remove it")
    if spec.model.resize_embeddings:
        text = f"found true; {what}, whose tokenizer belongs to its weights; remove it"
        yield _wrong("spec.model.resizeEmbeddings", text)
    if training.freeze != Freeze():
        text = f"found settings; {what}, remove them and choose what trains by method (full, lora or head)"
        yield _wrong("spec.training.freeze", text)
    if training.loss_weighting != "token":
        text = f"found {training.loss_weighting}; {what}, whose pairs all have the same weight; remove it"
        yield _wrong("spec.training.lossWeighting", text)
    if training.max_tokens_per_micro_batch is not None:
        text = f"found {training.max_tokens_per_micro_batch}; {what}, whose micro batches have a fixed number of pairs"
        yield _wrong("spec.training.maxTokensPerMicroBatch", f"{text}; remove it")
    if training.samples is not None:
        yield _wrong("spec.training.samples", f"found settings; {what}, which answers no questions; remove them")
    if training.group_by_length:
        yield _wrong("spec.training.groupByLength", f"found true; {what}, which draws pairs at random; set false")
    for section, datasets in (("train", spec.data.train), ("validation", spec.data.validation)):
        for name, dataset in datasets.items():
            if dataset.data_augment:
                field = f"spec.data.{section}.{name}.dataAugment"
                yield _wrong(field, f"found true; {what}, which always crops and mirrors training images; set false")
    if spec.run_policy.on_out_of_memory == "halveMicroBatch":
        text = f"found halveMicroBatch; {what}, whose pairs in a micro batch are each other's negatives; use fail"
        yield _wrong("spec.runPolicy.onOutOfMemory", text)


def _for_chat(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    for name, task in spec.evaluation.tasks.items():
        field = f"spec.evaluation.tasks.{name}"
        if task.task.startswith("retrieval"):
            yield _wrong(f"{field}.task", f"found {task.task}; {_ONLY} has retrieval tasks, use another task")
        if task.beams is not None:
            yield _wrong(f"{field}.beams", f"found {task.beams}; {_ONLY} has beam search, remove it")
    if spec.method == "head":
        yield _wrong("spec.method", f"found head; {_ONLY} has heads, use full or lora")
    if not spec.trains and "max_seq_length" in spec.training.model_fields_set:
        text = f"found {spec.training.max_seq_length}; {_ONLY} cuts captions, remove it"
        yield _wrong("spec.training.maxSeqLength", text)
    if spec.retrieval != Retrieval() and spec.trains:  # whose rules refuse them for every model
        yield _wrong("spec.retrieval", f"found settings; {_ONLY} has them, remove them")
    side, model = spec.image.tile_size, find_model(spec.model.name or "")
    if model is not None and side is not None and side % SIDE_OF_TOKEN:
        text = f"found {side}, expected a multiple of {SIDE_OF_TOKEN}, the pixels of a context token's side"
        yield _wrong("spec.image.tileSize", f"{text}; {spec.model.name} was trained with {model.tile_size}")


def _formats(spec: InternVLFineTuneSpec) -> Iterator[tuple[str, str]]:
    for section, datasets in (("train", spec.data.train), ("validation", spec.data.validation)):
        for name, dataset in datasets.items():
            yield f"spec.data.{section}.{name}.format", dataset.format
