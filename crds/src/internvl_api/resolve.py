"""spec + recipe + catalogue -> RunConfig: the only place where defaults meet."""

from typing import Any, get_args, get_origin

from pydantic import ValidationError

from internvl_api import gate
from internvl_api.catalogue import CATALOGUE, find_model
from internvl_api.evaluation import TASK_DEFAULTS, Evaluation
from internvl_api.kinds import misplaced
from internvl_api.recipes import load_recipe, recipe_names
from internvl_api.retrieval import RETRIEVAL_MODELS
from internvl_api.run_config import ResolvedModel, RunConfig
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.suggest import did_you_mean


class SpecError(ValueError):
    """The spec cannot be run. `field` is the path a user would edit, `message` says found, expected, next step."""

    def __init__(self, reason: str, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.reason, self.field, self.message = reason, field, message


def parse_spec(raw: object) -> InternVLFineTuneSpec:
    """A raw `spec` dict with its recipe merged under it, validated. Raises SpecError."""
    if not isinstance(raw, dict):
        raise SpecError("InvalidSpec", "spec", f"found {type(raw).__name__}, expected an object")
    recipe = raw.get("recipe")
    if recipe is None:
        return _validate(raw)
    if recipe not in recipe_names():
        hint = did_you_mean(str(recipe), recipe_names())
        raise SpecError(
            "UnknownRecipe", "spec.recipe", f"found {recipe!r}, which no recipe is called{hint}; see `recipes` in docs/"
        )
    return _validate(_merge(load_recipe(recipe), raw))


def resolve(spec: InternVLFineTuneSpec, *, job: str, job_uid: str) -> RunConfig:
    """The RunConfig of a parsed spec. Raises SpecError where fields contradict each other."""
    _check_kind(spec)
    _check_quantize(spec)
    _check_gate(spec.evaluation)
    _check_publish(spec)
    return RunConfig(
        job=job,
        job_uid=job_uid,
        recipe=spec.recipe,
        model=_resolve_model(spec),
        data=spec.data,
        image=spec.image,
        method=spec.method,
        lora=spec.lora,
        training=spec.training,
        retrieval=spec.retrieval,
        checkpoint=spec.checkpoint,
        evaluation=_resolve_evaluation(spec.evaluation),
        merge=spec.merge,
        publish=spec.publish,
        output=spec.output,
        workers=spec.workers,
        processes_per_worker=spec.processes_per_worker,
        device="cuda" if spec.gpus_per_worker else "cpu",
        gradient_accumulation=_gradient_accumulation(spec),
    )


def _resolve_model(spec: InternVLFineTuneSpec) -> ResolvedModel:
    model = spec.model
    if model.name is not None and model.name in RETRIEVAL_MODELS:
        place = model.source or f"hf://OpenGVLab/{model.name}"
        return ResolvedModel(name=model.name, kind="retrieval", source=place, drop_path_rate=model.drop_path_rate)
    entry = None
    if model.name is not None:
        entry = find_model(model.name)
        if entry is None:
            hint = did_you_mean(model.name, [*CATALOGUE, *RETRIEVAL_MODELS])
            raise SpecError(
                "UnknownModel",
                "spec.model.name",
                f"found {model.name!r}, which is not in the catalogue{hint}; leave it out to use model.source",
            )
    source = model.source or (f"hf://{entry.hub_repository}" if entry else None)
    if source is None:
        raise SpecError("ModelMissing", "spec.model", "found neither name nor source; name a model or say where it is")
    template = model.template or (entry.template if entry else None)
    return ResolvedModel(name=model.name, source=source, template=template, drop_path_rate=model.drop_path_rate)


def _check_kind(spec: InternVLFineTuneSpec) -> None:
    for field, message in misplaced(spec):
        raise SpecError("NotForThisModel", field, message)


def _resolve_evaluation(evaluation: Evaluation) -> Evaluation:
    """Every task with its lengths; a prompt stays open where the rows may bring their own."""
    tasks = {}
    for name, task in evaluation.tasks.items():
        defaults = TASK_DEFAULTS[task.task]
        most = defaults.max_new_tokens if task.max_new_tokens is None else task.max_new_tokens
        least = min(defaults.min_new_tokens, most) if task.min_new_tokens is None else task.min_new_tokens
        if least > most:
            raise SpecError(
                "InvalidSpec",
                f"spec.evaluation.tasks.{name}.minNewTokens",
                f"found {least}, which is more than maxNewTokens {most}; lower the one or raise the other",
            )
        lengths = {"min_new_tokens": least, "max_new_tokens": most, "format": task.format or defaults.format}
        tasks[name] = task.model_copy(update=lengths)
    return evaluation.model_copy(update={"tasks": tasks})


def _check_gate(evaluation: Evaluation) -> None:
    """Every figure that publishIf names must be measured, and by one task only."""
    field = "spec.evaluation.publishIf"
    if evaluation.publish_if is None:
        return
    try:
        operands = gate.operands(evaluation.publish_if)
    except gate.GateError as error:
        raise SpecError("InvalidCondition", field, str(error)) from None
    measured = evaluation.metrics()
    for operand in operands:
        if operand.baseline and not evaluation.baseline:
            raise SpecError(
                "InvalidCondition", field, f"found {operand}, but evaluation.baseline is false; set it to true"
            )
        with_it = [name for name in gate.tasks_with(operand.metric, measured) if operand.task in (None, name)]
        if not with_it:
            have = ", ".join(f"{name} ({', '.join(metrics)})" for name, metrics in measured.items()) or "none"
            raise SpecError("InvalidCondition", field, f"found {operand}, which no task measures; tasks: {have}")
        if len(with_it) > 1:
            raise SpecError(
                "InvalidCondition",
                field,
                f"found {operand}, which {len(with_it)} tasks measure; write {with_it[0]}.{operand.metric}",
            )


def _check_publish(spec: InternVLFineTuneSpec) -> None:
    """A Hub repository takes nothing without a token."""
    if spec.publish.hub is None or spec.secrets.hugging_face is not None:
        return
    if "HF_TOKEN" in {item.get("name") for item in spec.pod_template.env}:
        return
    raise SpecError(
        "SecretMissing",
        "spec.secrets.huggingFace",
        f"found none, but spec.publish.hub names {spec.publish.hub.repository}; name a Secret with the key HF_TOKEN",
    )


def _check_quantize(spec: InternVLFineTuneSpec) -> None:
    """Weights in 4 bits cannot learn, cannot be partitioned by ZeRO-3, and have their arithmetic on GPUs."""
    if spec.lora.quantize is None:
        return
    found = f"found {spec.lora.quantize}"
    wrong = {
        f"{found} with method {spec.method}; weights in 4 bits cannot learn, use method lora": spec.method != "lora",
        f"{found} with languageRank 0; the language model would learn nothing, give it a rank": (
            spec.lora.language_rank == 0
        ),
        f"{found} with gpusPerWorker 0; weights in 4 bits need a GPU, ask for GPUs or leave it out": (
            spec.gpus_per_worker == 0
        ),
        f"{found} with zeroStage 3, which cannot partition weights in 4 bits; use zeroStage 1 or 2": (
            spec.training.zero_stage == 3
        ),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise SpecError("QuantizeNotPossible", "spec.lora.quantize", message)


def _gradient_accumulation(spec: InternVLFineTuneSpec) -> int:
    training = spec.training
    per_forward = spec.world_size * training.micro_batch_size
    if training.global_batch_size % per_forward:
        lower = training.global_batch_size // per_forward * per_forward
        nearest = " or ".join(str(n) for n in (lower, lower + per_forward) if n)
        raise SpecError(
            "BatchNotDivisible",
            "spec.training.globalBatchSize",
            f"found {training.global_batch_size}, which {spec.world_size} processes x microBatchSize "
            f"{training.micro_batch_size} = {per_forward} does not divide; use {nearest}, or change workers, "
            "gpusPerWorker or microBatchSize",
        )
    return training.global_batch_size // per_forward


def _validate(raw: dict[str, Any]) -> InternVLFineTuneSpec:
    try:
        return InternVLFineTuneSpec.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(["spec", *(str(part) for part in first["loc"])])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "extra_forbidden":  # its value is not repeated: it may be a token in the wrong place
            hint = did_you_mean(str(first["loc"][-1]), _fields_at(first["loc"][:-1]))
            raise SpecError("InvalidSpec", field, f"there is no such field{hint}{more}") from None
        own_words = first["type"] in ("missing", "value_error")  # these say by themselves what was found
        found = "" if own_words else f"found {_short(first['input'])}: "
        raise SpecError("InvalidSpec", field, found + first["msg"].removeprefix("Value error, ") + more) from None


def _fields_at(path: tuple[str | int, ...]) -> list[str]:
    """Names of the fields that an object of the spec may have; none where the user names them."""
    kind: Any = InternVLFineTuneSpec
    for part in path:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            kind = _fields(kind).get(str(part))
            if type(None) in get_args(kind):
                kind = next(option for option in get_args(kind) if option is not type(None))
    return list(_fields(kind))


def _fields(kind: Any) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in getattr(kind, "model_fields", {}).items()}


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, objects merged key by key, everything else replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
