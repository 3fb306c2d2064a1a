"""Which keys of which Secret a stage's pods get: only what the stage needs, by name, one variable each."""

from typing import Any

from internvl_api.spec.tracking import TRACKER_KEYS

from internvl_operator.core.run import Run
from internvl_operator.core.stages import Stage

_STORAGE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_STORAGE_OPTIONS = (
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)
_WITHOUT_SOURCES = ("doctor", "baseline-score", "score")  # they read the run's output alone
_WITHOUT_TRACKER = ("preflight", "doctor", "merge")  # they report nothing to it
_MLFLOW_OPTIONS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_HUB_KEY = "HF_TOKEN"
_HUB_WRITE_KEY = "HF_WRITE_TOKEN"  # publish takes it, where the Secret has it, instead of HF_TOKEN


def env(run: Run, stage: Stage) -> list[dict[str, Any]]:
    """The variables from Secrets. A pod whose Secret or required key is missing does not start."""
    secrets, found = run.spec.secrets, []
    if secrets.object_storage:  # every stage reads and writes object storage
        found += [_variable(secrets.object_storage, key) for key in _STORAGE_KEYS]
        found += [_variable(secrets.object_storage, key, optional=True) for key in _STORAGE_OPTIONS]
    if secrets.hugging_face and _needs_hub(run, stage):
        found.append(_variable(secrets.hugging_face, _HUB_KEY))
        if stage.name == "publish":
            found.append(_variable(secrets.hugging_face, _HUB_WRITE_KEY, optional=True))
    if secrets.tracking and stage.name not in _WITHOUT_TRACKER:
        found += [_variable(secrets.tracking, key, optional=optional) for key, optional in _tracker_keys(run)]
    return found


def _tracker_keys(run: Run) -> list[tuple[str, bool]]:
    """(key, whether it is optional) of what the tracker's client reads."""
    tracking = run.spec.tracking
    if tracking is None or tracking.offline:
        return []
    required = TRACKER_KEYS[tracking.service]
    return [(required, False)] if required else [(key, True) for key in _MLFLOW_OPTIONS]


def _needs_hub(run: Run, stage: Stage) -> bool:
    """Publish writes to the Hub; it and _WITHOUT_SOURCES read no source, the other stages do."""
    if stage.name == "publish":
        return run.spec.publish.hub is not None
    if stage.name in _WITHOUT_SOURCES:
        return False
    return any(source.startswith("hf://") for _, source in run.spec.sources())


def _variable(secret: str, key: str, *, optional: bool = False) -> dict[str, Any]:
    reference: dict[str, Any] = {"name": secret, "key": key}
    return {"name": key, "valueFrom": {"secretKeyRef": reference | ({"optional": True} if optional else {})}}
