"""spec + recipe + catalogue -> RunConfig: the only place where defaults meet."""

from itertools import chain
from typing import Any

from pydantic import ValidationError

from internvl_api import publish_condition
from internvl_api.models.catalogue import CATALOGUE, find_model, hub_repository
from internvl_api.models.kinds import RETRIEVAL_MODELS
from internvl_api.recipes.files import load_recipe, recipe_names
from internvl_api.run_config import ResolvedModel, RunConfig
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.evaluation import TASK_DEFAULTS, Evaluation
from internvl_api.validation.cross_field import contradictions
from internvl_api.validation.messages import explain
from internvl_api.validation.model_kind import misplaced
from internvl_api.validation.pod_template import pod_template_mistakes
from internvl_api.validation.suggest import closest
from internvl_api.validation.violations import SpecError


def parse_spec(raw: object) -> InternVLFineTuneSpec:
    """A raw `spec` dict with its recipe merged under it, validated. Raises SpecError."""
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise SpecError("InvalidSpec", "spec", f"found {found}, expected an object")
    spec = _validate(_with_recipe(raw))
    _check_lora(raw, spec)
    return spec


def _with_recipe(raw: dict[str, Any]) -> dict[str, Any]:
    recipe = raw.get("recipe")
    if recipe is None:
        return raw
    if recipe not in recipe_names():
        name = closest(str(recipe), recipe_names())
        hint = f"did you mean {name!r}? " if name else ""
        text = f"unknown recipe {recipe!r}; {hint}`internvl-trainer recipes` lists all"
        raise SpecError("UnknownRecipe", "spec.recipe", text)
    return _merge(_under(load_recipe(recipe), raw), raw)


def resolve(spec: InternVLFineTuneSpec, *, job: str, job_uid: str) -> RunConfig:
    """The RunConfig of a parsed spec. Raises SpecError where fields contradict each other."""
    _check_kind(spec)
    _check_quantize(spec)
    for field, message, reason in chain(contradictions(spec), pod_template_mistakes(spec)):
        raise SpecError(reason, field, message)
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
        place = model.source or f"hf://{hub_repository(model.name)}"
        return ResolvedModel(name=model.name, kind="retrieval", source=place, drop_path_rate=model.drop_path_rate)
    entry = None
    if model.name is not None:
        entry = find_model(model.name)
        if entry is None:
            name = closest(model.name, [*CATALOGUE, *RETRIEVAL_MODELS])
            hint = f"did you mean {name!r}? Remove" if name else "remove"
            text = f"unknown model {model.name!r}; {hint} model.name to load model.source alone"
            raise SpecError("UnknownModel", "spec.model.name", text)
    source = model.source or (f"hf://{entry.hub_repository}" if entry else None)
    if source is None:
        raise SpecError("ModelMissing", "spec.model", "no base model; set recipe, model.name or model.source")
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
                f"minNewTokens {least} is more than maxNewTokens {most}; lower minNewTokens or raise maxNewTokens",
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
        operands = publish_condition.operands(evaluation.publish_if)
    except publish_condition.ConditionError as error:
        raise SpecError("InvalidCondition", field, str(error)) from None
    if not evaluation.tasks:
        text = f"publishIf {evaluation.publish_if!r} needs metrics, but evaluation.tasks is empty; add a task that "
        raise SpecError("InvalidCondition", field, f"{text}measures them")
    measured = evaluation.metrics()
    for operand in operands:
        if operand.baseline and not evaluation.baseline:
            text = f"publishIf uses {operand}, but evaluation.baseline is false; set evaluation.baseline to true"
            raise SpecError("InvalidCondition", field, text)
        with_it = [
            name for name in publish_condition.tasks_with(operand.metric, measured) if operand.task in (None, name)
        ]
        if not with_it:
            have = ", ".join(f"{name} ({', '.join(metrics)})" for name, metrics in measured.items())
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
        f"required because publish.hub is {spec.publish.hub.repository}; name a Secret with the key HF_TOKEN",
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
            f"{training.global_batch_size} is not a multiple of {per_forward} ({spec.world_size} processes x "
            f"microBatchSize {training.micro_batch_size}); use {nearest}, or change workers, gpusPerWorker or "
            "microBatchSize",
        )
    return training.global_batch_size // per_forward


def _validate(raw: dict[str, Any]) -> InternVLFineTuneSpec:
    try:
        return InternVLFineTuneSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError("InvalidSpec", *explain(error)) from None


def _under(recipe: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """A recipe's figures for what the user wrote; its template and source go with its own model only."""
    model = raw.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if name in (None, recipe["model"]["name"]):
        return recipe
    own = {key: value for key, value in recipe["model"].items() if key not in ("name", "template", "source")}
    return recipe | {"model": own}


def _check_lora(raw: dict[str, Any], spec: InternVLFineTuneSpec) -> None:
    """An adapter that the user describes (a recipe's is no matter), and a method that makes none."""
    if raw.get("lora") and spec.method != "lora" and spec.lora.quantize is None:  # for which there are better words
        text = f"found settings, but spec.method is {spec.method}, which makes no adapter; set it to lora, or leave "
        raise SpecError("InvalidSpec", "spec.lora", f"{text}them out")


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, objects merged key by key, everything else replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
