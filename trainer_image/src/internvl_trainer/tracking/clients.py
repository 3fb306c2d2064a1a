"""The clients of the trackers: one class each, over the package that its maker publishes."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from internvl_api.run_config import RunConfig

from internvl_trainer.errors import UserError
from internvl_trainer.tracking.records import Metrics, Settings, Status

_ID_TAG = "internvl.id"
_METRICS_A_REQUEST = 1000  # and parameters and tags: limits of MLflow's API
_PARAMETERS_A_REQUEST = 100
_STATUS = {"finished": "FINISHED", "failed": "FAILED"}


class Client(Protocol):
    """One tracked run. Every method may raise whatever the package raises."""

    def describe(self, parameters: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Set parameters and tags; those of an earlier attempt stay or are replaced."""
        ...

    def add(self, metrics: Sequence[Metrics]) -> None:
        """Add figures of steps."""
        ...

    def conclude(self, scores: Mapping[str, float], addresses: Mapping[str, str]) -> None:
        """Set figures of the whole run, and the addresses of what it made."""
        ...

    def close(self, status: Status) -> None:
        """Send what is left."""
        ...


def check_client(config: RunConfig) -> None:
    """Raise UserError when this image lacks the package of the tracker that the run names."""
    service = config.tracking.service if config.tracking else None
    if service is None or importlib.util.find_spec(service) is not None:
        return
    raise UserError(
        "TrackerMissing",
        f"service is {service}, but this image has no Python package {service}; build the trainer image with "
        f"EXTRAS={service}, or on one machine `pip install 'internvl-trainer[{service}]'`, or remove spec.tracking",
        "spec.tracking.service",
    )


def open_client(settings: Settings) -> Client:
    """Find or make the tracked run."""
    makers: dict[str, type[Any]] = {"mlflow": MlflowRun, "wandb": WandbRun, "swanlab": SwanlabRun}
    client: Client = makers[settings.tracking.service](settings)
    return client


class MlflowRun:
    """A run on an MLflow server, found by its tag."""

    def __init__(self, settings: Settings) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(settings.tracking.url)
        experiment = self._experiment(settings.experiment)
        found = self._client.search_runs([experiment], f"tags.`{_ID_TAG}` = '{settings.id}'", max_results=1)
        run = found[0] if found else self._client.create_run(
            experiment, tags={_ID_TAG: settings.id}, run_name=settings.run_name
        )  # fmt: skip
        self._id = run.info.run_id
        self._known = set(run.data.params)
        history = self._client.get_metric_history(self._id, "train/loss") if "train/loss" in run.data.metrics else []
        self._last = max((point.step for point in history), default=0)
        if run.info.status != "RUNNING":
            self._client.update_run(self._id, status="RUNNING")

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        for _ in range(2):  # another run of the namespace may make it at the same time
            if found := self._client.get_experiment_by_name(name):
                return str(found.experiment_id)
            try:
                return str(self._client.create_experiment(name))
            except MlflowException as error:
                failure = error
        raise failure

    def describe(self, parameters: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        # A parameter cannot change: what an attempt changed, such as the micro batch, keeps its first value.
        new = [Param(name, value) for name, value in parameters.items() if name not in self._known]
        for start in range(0, len(new), _PARAMETERS_A_REQUEST):
            self._client.log_batch(self._id, params=new[start : start + _PARAMETERS_A_REQUEST])
        self._known |= set(parameters)
        self._client.log_batch(self._id, tags=[RunTag(name, value) for name, value in tags.items()])

    def add(self, metrics: Sequence[Metrics]) -> None:
        from mlflow.entities import Metric

        # Steps that were sent before the checkpoint's attempt ended are there already.
        new = [
            Metric(name, value, each.at, each.step)
            for each in metrics
            for name, value in each.values.items()
            if each.step > self._last or "train/loss" not in each.values
        ]
        self._send(new)

    def conclude(self, scores: Mapping[str, float], addresses: Mapping[str, str]) -> None:
        from mlflow.entities import Metric, RunTag

        at = int(time.time() * 1000)
        metrics = [Metric(name, value, at, 0) for name, value in scores.items()]
        self._send(metrics)
        tags = [RunTag(f"artifact.{name}", address) for name, address in addresses.items()]
        self._client.log_batch(self._id, tags=tags)

    def _send(self, metrics: Sequence[Any]) -> None:
        for start in range(0, len(metrics), _METRICS_A_REQUEST):
            self._client.log_batch(self._id, metrics=metrics[start : start + _METRICS_A_REQUEST])

    def close(self, status: Status) -> None:
        if status != "unfinished":
            self._client.set_terminated(self._id, _STATUS[status])


class WandbRun:
    """A run of Weights & Biases; offline, its files are in the settings' folder."""

    def __init__(self, settings: Settings) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        tracking = settings.tracking
        options = {"base_url": tracking.url} if tracking.url else {}
        self._run = wandb.init(
            entity=tracking.entity,
            project=settings.experiment,
            name=settings.run_name,
            id=settings.id,
            dir=settings.folder,
            mode="offline" if tracking.offline else "online",
            resume=None if tracking.offline else "allow",
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True,
                x_disable_machine_info=True, init_timeout=30, login_timeout=10, **options,
            ),
        )  # fmt: skip

    def describe(self, parameters: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self._run.config.update({**parameters, **tags}, allow_val_change=True)

    def add(self, metrics: Sequence[Metrics]) -> None:
        for each in metrics:
            self._run.log(each.values, step=each.step)

    def conclude(self, scores: Mapping[str, float], addresses: Mapping[str, str]) -> None:
        self._run.summary.update({**scores, **{f"artifact/{name}": value for name, value in addresses.items()}})

    def close(self, status: Status) -> None:
        self._run.finish(exit_code=1 if status == "failed" else 0)


class SwanlabRun:
    """A run of SwanLab; offline, its files are in the settings' folder."""

    def __init__(self, settings: Settings) -> None:
        import swanlab

        self._swanlab, tracking = swanlab, settings.tracking
        if tracking.url:
            os.environ["SWANLAB_API_HOST"] = f"{tracking.url.rstrip('/')}/api"
            os.environ["SWANLAB_WEB_HOST"] = tracking.url
        resumed: dict[str, Any] = {} if tracking.offline else {"id": settings.id, "resume": "allow"}
        swanlab.init(
            project=settings.experiment,
            workspace=tracking.entity,
            experiment_name=settings.run_name,
            logdir=settings.folder,
            mode="offline" if tracking.offline else "cloud",
            settings=swanlab.Settings(
                hardware_monitor=False, collect_hardware=False, collect_runtime=False, requirements_collect=False,
                conda_collect=False, log_proxy_type="none",
            ),
            **resumed,
        )  # fmt: skip

    def describe(self, parameters: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self._swanlab.config.update({**parameters, **tags})

    def add(self, metrics: Sequence[Metrics]) -> None:
        for each in metrics:
            self._swanlab.log(each.values, step=each.step)

    def conclude(self, scores: Mapping[str, float], addresses: Mapping[str, str]) -> None:
        if scores:
            self._swanlab.log(dict(scores))
        self._swanlab.config.update({f"artifact/{name}": address for name, address in addresses.items()})

    def close(self, status: Status) -> None:
        states = self._swanlab.State
        if status == "failed":
            self._swanlab.finish(states.CRASHED, error="the stage failed")
        else:
            self._swanlab.finish(states.SUCCESS)
