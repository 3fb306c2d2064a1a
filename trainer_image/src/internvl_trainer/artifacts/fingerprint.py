"""The fingerprints of a run and of its stages: a digest of what decides the result, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from internvl_api.address import IDENTIFIED
from internvl_api.run_config import RunConfig
from internvl_api.spec import DEFAULT_TILING, Image
from internvl_api.status import StageName
from internvl_api.types import ApiModel

# Speed and placement may change from one attempt to the next; the loss curve stays the same (to rounding).
_WITHOUT_EFFECT = {
    "micro_batch_size",
    "max_tokens_per_micro_batch",
    "gradient_checkpointing",
    "zero_stage",
    "deepspeed",
    "data_workers",
    "samples",
}

# Fields that decide the losses on held-out rows; part of the identity where these losses decide the exported weights.
_HELD_OUT = {"validation", "validation_meta"}


def _dump(section: ApiModel, without: set[str] | None = None) -> dict[str, Any]:
    return section.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=without, context=IDENTIFIED)


def _dump_image(image: Image) -> dict[str, Any]:
    """The section without the default tiling, as earlier versions wrote it, so that their runs keep their identity."""
    default = Image(
        dynamic=DEFAULT_TILING.dynamic,
        min_dynamic_patch=DEFAULT_TILING.min_tiles,
        max_dynamic_patch=DEFAULT_TILING.max_tiles,
        thumbnail=DEFAULT_TILING.thumbnail,
    ).to_dict()
    return {name: value for name, value in _dump(image).items() if value != default.get(name)}


def _without_effect(config: RunConfig) -> set[str]:
    """The contrastive loss compares the rows of one micro batch, so a retrieval model's micro batch has an effect."""
    return _WITHOUT_EFFECT - ({"micro_batch_size"} if config.model.kind == "retrieval" else set())


def identity(config: RunConfig) -> dict[str, Any]:
    """Everything that decides the loss curve and the step that is exported, under the names of the spec.

    Fields with their default value are left out: an upgrade that adds a field still recognises the runs before it.
    """
    document = {
        "model": _dump(config.model, {"name"}),
        "data": _dump(config.data, {"preflight"} if uses_held_out(config) else {"preflight", *_HELD_OUT}),
        "image": _dump_image(config.image),
        "method": config.method,
        "training": _dump(config.training, _without_effect(config)),
    }
    if config.model.kind == "retrieval":
        document["retrieval"] = _dump(config.retrieval)
    if config.method == "lora":
        document["lora"] = _dump(config.lora)
    if uses_held_out(config):
        document["evaluation"] = {"everySteps": config.validation_every}
    if config.checkpoint.keep_best:
        document["checkpoint"] = {"keepBest": True}
    return document


def uses_held_out(config: RunConfig) -> bool:
    """Whether the losses on data.validation decide which weights training exports."""
    return config.checkpoint.keep_best or config.training.early_stopping is not None


def fingerprint(config: RunConfig, stage: StageName = "train") -> str:
    """Hex digest of what decides a stage's result: the identity, plus the sections only that stage reads.

    A changed evaluation therefore repeats no training, and a changed publishing condition repeats nothing.
    """
    document = identity(config) | _beyond_training(config, stage)
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]


def _beyond_training(config: RunConfig, stage: StageName) -> dict[str, Any]:
    """The sections of the spec that this stage reads and training does not; empty ones are left out."""
    tasks = {name: _dump(task) for name, task in config.evaluation.tasks.items()}
    validation = {name: _dump(dataset) for name, dataset in config.data.validation.items()}
    sections: dict[StageName, dict[str, Any]] = {
        "preflight": {
            "tasks": tasks,
            "validation": validation,
            "validationMeta": config.data.validation_meta,
            **_dump(config.data.preflight, {"cache", "workers"}),
        },
        "doctor": {"doctor": _dump(config.doctor), "workers": [config.workers, config.processes_per_worker]},
        "baseline-evaluate": {"tasks": tasks},
        "baseline-score": {"tasks": tasks},
        "evaluate": {"tasks": tasks},
        "score": {"tasks": tasks},
        "merge": {"merge": _dump(config.merge)},
        "publish": {"tasks": tasks, "merge": _dump(config.merge), "publish": _dump(config.publish)},
    }
    return {name: section for name, section in sections.get(stage, {}).items() if section}


def first_difference(theirs: Any, ours: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """The first field, in alphabetical order, in which two documents differ, with both values; None when equal."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            inner = f"{field}.{key}" if field else key
            if found := first_difference(theirs.get(key), ours.get(key), inner):
                return found
        return None
    return None if theirs == ours else (field, theirs, ours)
