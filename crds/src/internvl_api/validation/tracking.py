"""Rules for spec.tracking: settings that the named service does not have."""

from internvl_api.spec import Tracking
from internvl_api.validation.cel_rules import Values, rule


@rule(
    "tracking",
    "self.?service.orValue('') != 'mlflow' || has(self.url)",
    "service mlflow needs url; set it to the address of the tracking server, such as https://mlflow.example.org",
    field="url",
    required=True,
)
def mlflow_has_url(tracking: Tracking) -> Values | None:
    """MLflow has no public server."""
    return {} if tracking.service == "mlflow" and tracking.url is None else None


@rule(
    "tracking",
    "self.?service.orValue('') != 'mlflow' || (!has(self.entity) && !self.?offline.orValue(false))",
    "found {found}, which service mlflow does not have; remove it, or set service to wandb or swanlab",
    found="has(self.entity) ? 'entity' : 'offline'",
)
def not_of_mlflow(tracking: Tracking) -> Values | None:
    """MLflow's client has neither teams nor a mode without a server."""
    if tracking.service != "mlflow" or (tracking.entity is None and not tracking.offline):
        return None
    return {"found": "offline" if tracking.entity is None else "entity"}


@rule(
    "tracking",
    "self.?service.orValue('') == 'mlflow' || !self.?offline.orValue(false) || !has(self.url)",
    "offline is true, so no server is contacted and url has no effect; remove one of the two",
    field="url",
)
def offline_has_no_url(tracking: Tracking) -> Values | None:
    """A server is named only where it is contacted."""
    return {} if tracking.service != "mlflow" and tracking.offline and tracking.url is not None else None


@rule(
    "tracking",
    "!has(self.experiment) || self.?service.orValue('') == 'mlflow' || !self.experiment.matches('[/@]')",
    "found '{found}'; a project of {service} has no / and no @ in its name, and entity names its owner",
    field="experiment",
    found="self.experiment",
    service="self.service",
)
def project_name(tracking: Tracking) -> Values | None:
    """Only MLflow's experiments may be paths."""
    name = tracking.experiment or ""
    return (
        {"found": name, "service": tracking.service} if tracking.service != "mlflow" and set("/@") & set(name) else None
    )


RULES = (mlflow_has_url, not_of_mlflow, offline_has_no_url, project_name)
