"""Fields that are valid by themselves and do not go together. A setting that would have no effect is refused too."""

import re
from collections.abc import Iterator
from typing import Any

from internvl_api.models.catalogue import MODEL_NAMES, model_at
from internvl_api.models.kinds import RETRIEVAL_MODELS
from internvl_api.recipes.files import recipe_names
from internvl_api.spec import Data, Image, InternVLFineTuneSpec, Scheduling, Training
from internvl_api.validation.cel_rules import Values, given, positive, rule
from internvl_api.validation.evaluation_alone import ALONE
from internvl_api.validation.suggest import cel_list, cel_prefix_hint, prefix_or_closest
from internvl_api.validation.violations import Violation


def _default(model: Any, name: str) -> int:
    value = model.model_fields[name].default
    assert isinstance(value, int)
    return value


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_WORKERS = f"self.?workers.orValue({_default(InternVLFineTuneSpec, 'workers')})"
_GPUS = f"self.?gpusPerWorker.orValue({_default(InternVLFineTuneSpec, 'gpus_per_worker')})"
_MICRO = f"self.?training.?microBatchSize.orValue({_default(Training, 'micro_batch_size')})"
_GLOBAL = f"self.?training.?globalBatchSize.orValue({_default(Training, 'global_batch_size')})"
_PROCESSES = f"({positive(_WORKERS)} * {positive(_GPUS)})"
_FORWARD = f"({_PROCESSES} * {positive(_MICRO)})"  # samples in one forward pass of all ranks
_LOWER = f"({_GLOBAL} / {_FORWARD} * {_FORWARD})"
_LEAST_FORWARD = f"({positive('self.?minWorkers.orValue(1)')} * {positive(_GPUS)} * {positive(_MICRO)})"
_BATCH_FIELDS = ("workers", "gpusPerWorker", "training.globalBatchSize", "training.microBatchSize")


@rule(
    "recipe",
    f"self in {cel_list(recipe_names())}",
    "unknown recipe '{found}'; {hint}`internvl-trainer recipes` lists all",
    reason="UnknownRecipe",
    found="self",
    hint=cel_prefix_hint(recipe_names(), "did you mean '%s'? "),
)
def known_recipe(recipe: str) -> Values | None:
    """The recipe exists."""
    if recipe in recipe_names():
        return None
    name = prefix_or_closest(recipe, recipe_names())
    return {"found": recipe, "hint": f"did you mean '{name}'? " if name else ""}


@rule(
    "model.name",
    f"self in {cel_list(MODEL_NAMES)}",
    "unknown model '{found}'; {hint} model.name to load model.source alone",
    reason="UnknownModel",
    found="self",
    hint=cel_prefix_hint(MODEL_NAMES, "did you mean '%s'? Remove", "remove"),
)
def known_model(model: str) -> Values | None:
    """The model is in the catalogue."""
    if model in MODEL_NAMES:
        return None
    name = prefix_or_closest(model, MODEL_NAMES)
    return {"found": model, "hint": f"did you mean '{name}'? Remove" if name else "remove"}


@rule(
    "",
    f"{given('recipe')} || {given('model.name')} || {given('model.source')}",
    "no base model; set recipe, model.name or model.source",
    field="model",
    reason="ModelMissing",
    required=True,
)
def base_model(spec: InternVLFineTuneSpec) -> Values | None:
    """Something names the base model."""
    return {} if spec.model.name is None and spec.model.source is None else None


@rule(
    "data",
    "!has(self.metaRoot) || has(self.meta) || has(self.validationMeta)",
    "metaRoot has no effect without meta or validationMeta; remove it or name the meta JSON",
    field="metaRoot",
)
def meta_root(data: Data) -> Values | None:
    """A root for a meta JSON needs one."""
    return None if data.meta_root is None or data.meta or data.validation_meta else {}


@rule(
    "data",
    "self.badRows == 'skip' || self.?maxBadRows.orValue(0) == 0",
    "found maxBadRows {most:d} with badRows: fail; set badRows to skip",
    most="self.maxBadRows",
)
def bad_rows(data: Data) -> Values | None:
    """A limit of skipped rows only where rows are skipped."""
    return {"most": data.max_bad_rows} if data.max_bad_rows and data.bad_rows == "fail" else None


@rule(
    "image",
    "self.?minDynamicPatch.orValue(1) <= self.?maxDynamicPatch.orValue(64)",
    "minDynamicPatch {least:d} exceeds maxDynamicPatch {most:d}; lower minDynamicPatch or raise maxDynamicPatch",
    least="self.minDynamicPatch",
    most="self.maxDynamicPatch",
)
def tile_bounds(image: Image) -> Values | None:
    """The bounds of the number of tiles are in order."""
    least, most = image.min_dynamic_patch, image.max_dynamic_patch
    return {"least": least, "most": most} if least is not None and most is not None and least > most else None


@rule(
    "",  # a recipe may supply what the user leaves out
    f"{ALONE} || ({given('recipe')} && !({given(*_BATCH_FIELDS)})) || {_GLOBAL} % {_FORWARD} == 0",
    "{found:d} is not a multiple of {forward:d} ({processes:d} processes x microBatchSize {micro:d}); use "
    "{lower}{upper:d}, or change workers, gpusPerWorker or microBatchSize",
    field="training.globalBatchSize",
    reason="BatchNotDivisible",
    found=_GLOBAL,
    forward=_FORWARD,
    processes=_PROCESSES,
    micro=_MICRO,
    lower=f"{_LOWER} > 0 ? '%d or '.format([{_LOWER}]) : ''",
    upper=f"{_LOWER} + {_FORWARD}",
)
def batch_divides(spec: InternVLFineTuneSpec) -> Values | None:
    """The global batch is a whole number of forward passes of all ranks."""
    found, micro = spec.training.global_batch_size, spec.training.micro_batch_size
    forward = spec.world_size * micro
    if found % forward == 0 or not spec.trains:
        return None
    lower = found // forward * forward
    return {
        "found": found,
        "forward": forward,
        "processes": spec.world_size,
        "micro": micro,
        "lower": f"{lower} or " if lower else "",
        "upper": lower + forward,
    }


@rule(
    "",
    f"!has(self.minWorkers) || ({given('recipe')} && !has(self.workers)) || self.minWorkers <= {_WORKERS}",
    "minWorkers {least:d} exceeds workers {most:d}; lower minWorkers or raise workers",
    field="minWorkers",
    least="self.minWorkers",
    most=_WORKERS,
)
def least_workers(spec: InternVLFineTuneSpec) -> Values | None:
    """The least number of workers is at most the wanted one."""
    least, most = spec.min_workers, spec.workers
    return {"least": least, "most": most} if least is not None and least > most else None


@rule(
    "",
    f"!has(self.minWorkers) || {ALONE} || ({given('recipe')} && !({given(*_BATCH_FIELDS)})) || "
    f"{_GLOBAL} % {_LEAST_FORWARD} == 0",
    "{least:d} workers cannot share globalBatchSize {found:d}: it is not a multiple of {forward:d} (minWorkers x "
    "processes of a worker x microBatchSize); choose a minWorkers whose share is whole",
    field="minWorkers",
    reason="BatchNotDivisible",
    least="self.minWorkers",
    found=_GLOBAL,
    forward=_LEAST_FORWARD,
)
def least_workers_share_batch(spec: InternVLFineTuneSpec) -> Values | None:
    """The least number of workers has a whole share of the global batch."""
    least, found = spec.min_workers, spec.training.global_batch_size
    if least is None or not spec.trains:
        return None
    forward = least * spec.processes_per_worker * spec.training.micro_batch_size
    return {"least": least, "found": found, "forward": forward} if found % forward else None


@rule(
    "training",
    "!self.?packing.?enabled.orValue(false) || !self.?groupByLength.orValue(false)",
    "groupByLength is true, but packing.enabled already fills every sequence; set groupByLength to false",
)
def packed_or_grouped(training: Training) -> Values | None:
    """Rows are packed or grouped by length, not both."""
    return {} if training.packing.enabled and training.group_by_length else None


@rule(
    "training",
    "self.?warmupSteps.orValue(0) == 0 || self.?warmupSteps.orValue(0) < self.?maxSteps.orValue(2147483647)",
    "warmupSteps {warmup:d} must be below maxSteps {most:d}, else the full learning rate is never reached; lower "
    "warmupSteps",
    field="warmupSteps",
    warmup="self.warmupSteps",
    most="self.maxSteps",
)
def warmup_ends(training: Training) -> Values | None:
    """The warm-up ends before training does."""
    warmup, most = training.warmup_steps, training.max_steps
    return {"warmup": warmup, "most": most} if warmup and most is not None and warmup >= most else None


@rule(
    "scheduling",
    "self.?gang.orValue('') != 'kueue' || has(self.queue)",
    "gang: kueue needs queue; set it to a LocalQueue of the run's namespace",
)
def kueue_has_queue(scheduling: Scheduling) -> Values | None:
    """kueue knows which queue to use."""
    return {} if scheduling.gang == "kueue" and scheduling.queue is None else None


@rule(
    "scheduling",
    "!has(self.queue) || self.?gang.orValue('') in ['kueue', 'volcano']",
    "queue '{found}' needs gang: kueue or gang: volcano; set gang, or remove queue",
    found="self.queue",
)
def queue_has_gang(scheduling: Scheduling) -> Values | None:
    """Only schedulers with queues get one."""
    ignored = scheduling.queue is not None and scheduling.gang not in ("kueue", "volcano")
    return {"found": scheduling.queue} if ignored else None


@rule(
    "",
    f"!{given('publish.hub')} || {given('secrets.huggingFace')} || "
    f"({given('podTemplate.env')} && self.podTemplate.env.exists(item, item.name == 'HF_TOKEN'))",
    "required because publish.hub is {repository}; name a Secret with the key HF_TOKEN",
    field="secrets.huggingFace",
    reason="SecretMissing",
    required=True,
    before=f"!{given('publish.hub')} || {given('secrets.huggingFace')} || {given('podTemplate.env')}",
    repository="self.publish.hub.repository",
)
def hub_has_token(spec: InternVLFineTuneSpec) -> Values | None:
    """Publishing to the Hub has a token."""
    hub = spec.publish.hub
    if hub is None or spec.secrets.hugging_face is not None:
        return None
    has_token = any(item["name"] == "HF_TOKEN" for item in spec.pod_template.env)
    return None if has_token else {"repository": hub.repository}


@rule(
    "training",
    "!has(self.samples) || self.?zeroStage.orValue(1) != 3",
    "samples needs whole weights on each rank, which zeroStage 3 has not; set zeroStage to 1 or 2, or remove samples",
    field="samples",
)
def samples_have_whole_weights(training: Training) -> Values | None:
    """Each rank answers sample rows alone."""
    return {} if training.samples is not None and training.zero_stage == 3 else None


RULES = (
    known_recipe, known_model, base_model, meta_root, bad_rows, tile_bounds, packed_or_grouped,
    warmup_ends, kueue_has_queue, queue_has_gang, hub_has_token, batch_divides,
    least_workers, least_workers_share_batch, samples_have_whole_weights,
)  # fmt: skip


def python_only(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Violations that no rule of the CRD finds: they depend on the recipe, or exceed what CEL may cost."""
    if spec.trains:  # whose rules refuse all settings of training
        yield from _quantize(spec)
        yield from _resize(spec)
        yield from _nothing_trains(spec)
    yield from _source(spec)
    yield from _addresses(spec)
    if len(set(spec.merge.formats)) < len(spec.merge.formats):
        yield Violation("spec.merge.formats", f"found {spec.merge.formats[0]} twice; name each format once")
    expected = [part.partition("=")[0] for part in (spec.doctor.expect or "").split(",")]
    if twice := next((name for name in expected if expected.count(name) > 1), None):
        yield Violation("spec.doctor.expect", f"found {twice} twice; name each amount once")


def unused_lora(written: dict[str, Any], spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """Adapter settings with a method that trains no adapter. `written`: the spec without its recipe's settings."""
    if not spec.trains or spec.lora.quantize is not None:  # they have their own messages
        return
    if written.get("lora") and spec.method != "lora":
        text = f"found settings, but method {spec.method} trains no adapter; set method to lora, or remove spec.lora"
        yield Violation("spec.lora", text)


def _quantize(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    found = spec.lora.quantize
    if found is None:
        return
    wrong = {
        f"method {spec.method}; 4-bit weights cannot be trained, set method to lora": spec.method != "lora",
        "languageRank 0; the language model would have nothing to train, set a rank": spec.lora.language_rank == 0,
        "gpusPerWorker 0; 4-bit weights need a GPU, set gpusPerWorker or remove quantize": spec.gpus_per_worker == 0,
        "zeroStage 3; ZeRO-3 cannot shard 4-bit weights, set zeroStage to 1 or 2": spec.training.zero_stage == 3,
    }
    for text, is_wrong in wrong.items():
        if is_wrong:
            yield Violation("spec.lora.quantize", f"found {found} with {text}", "QuantizeNotPossible")


def _resize(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """New rows of embeddings that would not learn."""
    if not spec.model.resize_embeddings or spec.model.name in RETRIEVAL_MODELS:
        return
    field, reason = "spec.model.resizeEmbeddings", "ResizeNotPossible"
    if spec.method != "full":
        text = f"found true with method {spec.method}, which trains no embeddings; set method to full"
        yield Violation(field, text, reason)
    elif spec.training.freeze.language:
        text = "found true with training.freeze.language true, so the new rows would not learn; set that to false"
        yield Violation(field, text, reason)


def _source(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """A source that is known to hold another model than the named one, whose template would be wrong."""
    name, source = spec.model.name, spec.model.source or ""
    other = model_at(source)
    if name is not None and other is not None and other != name:
        whose = f" (from recipe {spec.recipe})" if spec.recipe else ""
        text = f"found {source}, which holds {other}, but model.name is {name}{whose}; set model.name to {other}"
        yield Violation("spec.model.source", text)


def _nothing_trains(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    lora, freeze = spec.lora, spec.training.freeze
    if spec.method == "lora" and lora.language_rank == lora.vision_rank == 0:
        text = "found languageRank 0 and visionRank 0, so nothing trains; set one of them to a rank, such as 16"
        yield Violation("spec.lora.languageRank", text, "LoraRankMissing")
    if spec.method == "full" and freeze.vision and freeze.projector and freeze.language:
        text = "found true for vision, projector and language, so nothing trains; set one to false, or method to lora"
        yield Violation("spec.training.freeze", text, "NothingToTrain")


def _addresses(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    cache = spec.data.preflight.cache
    if cache and f"{cache.rstrip('/')}/".startswith(f"{spec.output}/"):
        text = (
            f"found {cache!r} in the run's own output, which no other run reads; name a folder beside {spec.output!r}"
        )
        yield Violation("spec.data.preflight.cache", text)
    for field, address in [*spec.destinations(), *spec.sources()]:
        if ".." in address.split("/"):
            yield Violation(field, f"found {address!r}, expected an address without '..'; write the whole path")
        if _CONTROL.search(address):
            yield Violation(field, f"found {address!r}, expected an address without control characters; remove them")
    for field, address in spec.sources():
        if address.rstrip("/") == spec.output:
            text = f"found {spec.output!r}, which {field} reads from; name a folder for the results alone"
            yield Violation("spec.output", text)
