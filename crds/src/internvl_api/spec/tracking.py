"""The section `tracking` of a spec: a tracker of experiments that shows the run beside others."""

from typing import Literal

from pydantic import Field

from internvl_api.types import ApiModel

# No user name, password, query or fragment: an address is stored and shown.
TRACKER_PATTERN = r"^https?://[A-Za-z0-9.:\[\]-]+(/[^\s@?#;]*)?$"
EXPERIMENT_PATTERN = r"^[A-Za-z0-9/][A-Za-z0-9._@/-]*$"
RUN_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+/-]*$"

TRACKER_KEYS = {"mlflow": None, "wandb": "WANDB_API_KEY", "swanlab": "SWANLAB_API_KEY"}
"""Service -> the key without which its server answers nobody; MLflow's server may answer everybody."""


class Tracking(ApiModel):
    """Where rank 0 reports parameters, curves, scores and the addresses of artifacts, with the service's own client."""

    service: Literal["mlflow", "wandb", "swanlab"] = Field(
        description="Kind of the tracker; the trainer image needs the extra of that name"
    )
    url: str | None = Field(
        None,
        pattern=TRACKER_PATTERN,
        max_length=512,
        description="Address of the tracker's server, without user name, password and query; required for mlflow. "
        "Default: the service's public server",
    )
    experiment: str | None = Field(
        None,
        pattern=EXPERIMENT_PATTERN,
        max_length=100,
        description="MLflow's experiment, or the project of wandb or swanlab. Default: the run's namespace",
    )
    run_name: str | None = Field(
        None,
        pattern=RUN_NAME_PATTERN,
        max_length=128,
        description="Name of the run in the tracker. Default: the name of the resource",
    )
    entity: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=64,
        description="Team or user that owns the project, of wandb and swanlab (its workspace). Default: that of the "
        "key",
    )
    offline: bool = Field(
        False,
        description="true, of wandb and swanlab: contact no server, and store the client's files under "
        "OUTPUT/tracking/ for its command sync",
    )
