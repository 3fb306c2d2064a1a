"""Which run an output belongs to: what decides its loss curve, and nothing that does not."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from internvl_api.base import ApiModel
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError

RUN_FILE = "run.json"

# How fast or on what a run goes may change from one attempt to the next; the curve stays (to rounding).
_WITHOUT_EFFECT = {
    "micro_batch_size",
    "gradient_checkpointing",
    "zero_stage",
    "deepspeed",
    "data_workers",
}


def _dump(section: ApiModel, without: set[str] | None = None) -> dict[str, Any]:
    return section.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=without)


def _without_effect(config: RunConfig) -> set[str]:
    """A picture is told apart from the other texts of its forward: there the micro batch has an effect."""
    return _WITHOUT_EFFECT - ({"micro_batch_size"} if config.model.kind == "retrieval" else set())


def identity(config: RunConfig) -> dict[str, Any]:
    """Everything that decides the curve, under the names of the spec.

    Fields that have their default are left out, so that a version with a new field knows the runs of an older one.
    """
    document = {
        "model": _dump(config.model, {"name"}),
        "data": _dump(config.data, {"validation"}),
        "image": _dump(config.image),
        "method": config.method,
        "training": _dump(config.training, _without_effect(config)),
    }
    if config.model.kind == "retrieval":
        document["retrieval"] = _dump(config.retrieval)
    if config.method == "lora":
        document["lora"] = _dump(config.lora)
    return document


def fingerprint(config: RunConfig, stage: StageName = "train") -> str:
    """Hex digest of what decides a stage's result: the identity, and what the spec asks of that stage beyond it.

    A changed evaluation therefore repeats no training, and a changed publishing condition repeats nothing at all.
    """
    document = identity(config) | _beyond_training(config, stage)
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]


def _beyond_training(config: RunConfig, stage: StageName) -> dict[str, Any]:
    """Sections that the user left alone are left out, so that older outputs stay known."""
    tasks = {name: _dump(task) for name, task in config.evaluation.tasks.items()}
    validation = {name: _dump(dataset) for name, dataset in config.data.validation.items()}
    sections: dict[StageName, dict[str, Any]] = {
        "preflight": {"tasks": tasks, "validation": validation},
        "baseline-evaluate": {"tasks": tasks},
        "evaluate": {"tasks": tasks},
        "merge": {"merge": _dump(config.merge)},
        "publish": {"tasks": tasks, "merge": _dump(config.merge), "publish": _dump(config.publish)},
    }
    return {name: section for name, section in sections.get(stage, {}).items() if section}


def claim_output(storage: Storage, config: RunConfig) -> None:
    """Write down whose output this is; called before the first thing worth keeping is stored."""
    document = {"job": config.job, "fingerprint": fingerprint(config), "identity": identity(config)}
    storage.write(RUN_FILE, json.dumps(document, indent=1, sort_keys=True).encode())


def check_output(storage: Storage, config: RunConfig) -> None:
    """Raises UserError when another run has already stored checkpoints or results here."""
    if storage.stat(RUN_FILE) is None:
        return
    try:
        stored = json.loads(storage.read(RUN_FILE))
        other = stored["identity"]
        owner = stored["job"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "OutputHoldsAnotherRun",
            f"{storage.uri}/{RUN_FILE} cannot be read ({error!r}); choose another output or delete that one",
            "spec.output",
        ) from error
    difference = first_difference(other, identity(config))
    if difference is not None:
        field, theirs, ours = difference
        raise UserError(
            "OutputHoldsAnotherRun",
            f"{storage.uri} holds the run of {owner}, which differs in spec.{field}: it has {_shown(theirs)}, this run "
            f"{_shown(ours)}; choose another output, or delete that one",
            "spec.output",
        )


def first_difference(theirs: Any, ours: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """The first field, in alphabetical order, in which two documents differ, with both values; None when equal."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            inner = f"{field}.{key}" if field else key
            if found := first_difference(theirs.get(key), ours.get(key), inner):
                return found
        return None
    return None if theirs == ours else (field, theirs, ours)


def _shown(value: Any) -> str:
    return "the default" if value is None else repr(value)


def stage_folder(stage: str) -> str:
    """Where a stage keeps what it makes."""
    return f"stages/{stage}"
