"""Which keys of which Secret a stage's pods get: only what the stage needs, by name, one variable each."""

from typing import Any

from internvl_api.spec.tracking import TRACKER_KEYS

from internvl_operator.core.run import Run
from internvl_operator.core.stages import Stage

_S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_S3_OPTIONS = (
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)
# Of other stores a Secret has one of several sets of keys, or is there for S3 alone: none is required.
_OTHER_STORES = {
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS_JSON",),
    "az": (
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_TENANT_ID",
        "AZURE_CLIENT_ID",
        "AZURE_CLIENT_SECRET",
    ),
}
_WITHOUT_SOURCES = ("doctor", "baseline-score", "score")  # they read the run's output alone
_WITHOUT_TRACKER = ("preflight", "doctor", "merge")  # they report nothing to it
_MLFLOW_OPTIONS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_HUB_KEY = "HF_TOKEN"
_HUB_WRITE_KEY = "HF_WRITE_TOKEN"  # publish takes it, where the Secret has it, instead of HF_TOKEN


def env(run: Run, stage: Stage) -> list[dict[str, Any]]:
    """The variables from Secrets. A pod whose Secret or required key is missing does not start."""
    secrets, found = run.spec.secrets, []
    if secrets.object_storage:  # every stage reads and writes object storage
        found += _storage_keys(run, secrets.object_storage)
    if secrets.hugging_face and _needs_hub(run, stage):
        found.append(_variable(secrets.hugging_face, _HUB_KEY))
        if stage.name == "publish":
            found.append(_variable(secrets.hugging_face, _HUB_WRITE_KEY, optional=True))
    if secrets.tracking and stage.name not in _WITHOUT_TRACKER:
        found += [_variable(secrets.tracking, key, optional=optional) for key, optional in _tracker_keys(run)]
    return found


def _storage_keys(run: Run, secret: str) -> list[dict[str, Any]]:
    """The keys of the stores that the run's addresses are in. S3's are required unless it is only in other stores."""
    cache = run.spec.data.preflight.cache
    addresses = [run.spec.output, *(address for _, address in run.spec.sources()), *([cache] if cache else [])]
    schemes = {address.partition("://")[0] for address in addresses}
    others = [store for store in _OTHER_STORES if store in schemes]
    found = [_variable(secret, key, optional=bool(others) and "s3" not in schemes) for key in _S3_KEYS]
    found += [_variable(secret, key, optional=True) for key in _S3_OPTIONS]
    return found + [_variable(secret, key, optional=True) for store in others for key in _OTHER_STORES[store]]


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
