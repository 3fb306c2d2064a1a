"""spec + recipe + catalogue -> RunConfig: the only place where defaults meet."""

from internvl_api.memory.stop_time import grace_seconds
from internvl_api.models.catalogue import find_model, hub_repository
from internvl_api.models.kinds import CAPTION_TOKENS, RETRIEVAL_MODELS, ModelKind
from internvl_api.run_config import ResolvedModel, RunConfig
from internvl_api.spec import Evaluation, InternVLFineTuneSpec, Model, Training
from internvl_api.spec.evaluation import TASK_DEFAULTS, EvaluationTask
from internvl_api.validation.check import check_spec


def parse_spec(raw: object) -> InternVLFineTuneSpec:
    """A raw `spec` with its recipe's settings, checked as on a single machine. Raises SpecError."""
    return check_spec(raw).require()


def resolve(spec: InternVLFineTuneSpec, *, job: str, job_uid: str) -> RunConfig:
    """The RunConfig of a checked spec."""
    training = _training(spec)
    config = RunConfig(
        job=job,
        job_uid=job_uid,
        recipe=spec.recipe,
        model=_model(spec.model),
        data=spec.data,
        image=spec.image,
        method=spec.method,
        lora=spec.lora,
        training=training,
        retrieval=spec.retrieval,
        checkpoint=spec.checkpoint,
        evaluation=_evaluation(spec.evaluation),
        merge=spec.merge,
        publish=spec.publish,
        doctor=spec.doctor,
        network=spec.network,
        tracking=spec.tracking,
        output=spec.output,
        workers=spec.workers,
        processes_per_worker=spec.processes_per_worker,
        device="cuda" if spec.gpus_per_worker else "cpu",
        gradient_accumulation=training.global_batch_size // (spec.world_size * training.micro_batch_size)
        if spec.trains
        else 1,
    )
    grace = grace_seconds(spec.pod_template.termination_grace_period_seconds, config)
    return config.model_copy(update={"grace_seconds": grace})


def _model(model: Model) -> ResolvedModel:
    entry = find_model(model.name) if model.name else None
    source = model.source or f"hf://{hub_repository(str(model.name))}"
    template = model.template or (entry.template if entry else None)
    kind: ModelKind = "retrieval" if model.name in RETRIEVAL_MODELS else "chat"
    return ResolvedModel(
        name=model.name,
        kind=kind,
        source=source,
        adapter=model.adapter,
        template=template,
        drop_path_rate=model.drop_path_rate,
        resize_embeddings=model.resize_embeddings,
    )


def _training(spec: InternVLFineTuneSpec) -> Training:
    """With method none, a retrieval model reads captions as upstream's evaluation does, unless the spec says more."""
    training = spec.training
    if spec.trains or spec.model.name not in RETRIEVAL_MODELS:
        return training
    written = "max_seq_length" in training.model_fields_set
    return training if written else training.model_copy(update={"max_seq_length": CAPTION_TOKENS})


def _evaluation(evaluation: Evaluation) -> Evaluation:
    """Every task with its answer lengths and format; a prompt stays open where rows may have their own."""
    return evaluation.model_copy(update={"tasks": {name: _task(task) for name, task in evaluation.tasks.items()}})


def _task(task: EvaluationTask) -> EvaluationTask:
    defaults = TASK_DEFAULTS[task.task]
    most = defaults.max_new_tokens if task.max_new_tokens is None else task.max_new_tokens
    least = min(defaults.min_new_tokens, most) if task.min_new_tokens is None else task.min_new_tokens
    return task.model_copy(
        update={"min_new_tokens": least, "max_new_tokens": most, "format": task.format or defaults.format}
    )
