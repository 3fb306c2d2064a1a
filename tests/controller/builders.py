"""Small raw objects, as the API server would show them, with only what a test is about."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from internvl_api.constants import API_VERSION, KIND
from internvl_operator.core.observe import Pod
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.resources import names, pods
from internvl_operator.core.run import Run, read_run
from internvl_operator.core.stages import Stage

Raw = dict[str, Any]
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
CONFIG = OperatorConfig(gang_schedulers=("volcano",))
UID = "11111111-0000-4000-8000-000000000001"


def at(seconds: float) -> datetime:
    """NOW and so many seconds."""
    return NOW + timedelta(seconds=seconds)


def text(moment: datetime) -> str:
    """As Kubernetes writes a time."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def spec(**changes: Any) -> Raw:
    """A valid spec with two workers; top-level fields replaced by `changes`."""
    base: Raw = {
        "model": {"source": "s3://models/tiny"},
        "data": {"train": {"photos": {"annotation": "s3://data/train.jsonl"}}},
        "output": "s3://out/run",
        "workers": 2,
        "secrets": {"objectStorage": "s3-credentials"},
    }
    return base | changes


def custom_resource(name: str = "run", *, generation: int = 1, status: Raw | None = None, **changes: Any) -> Raw:
    """A raw InternVLFineTune; `changes` go to its spec."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": UID,
            "generation": generation,
            "creationTimestamp": text(at(-1)),
            "resourceVersion": "1",
        },
        "spec": spec(**changes),
        **({"status": status} if status is not None else {}),
    }


def a_run(name: str = "run", **changes: Any) -> Run:
    """The same, read."""
    return read_run(custom_resource(name, **changes))


def member(rank: int = 0, *, stage: str = "train", attempt: int = 1, of: Run | None = None, **fields: Any) -> Pod:
    """A pod as observed, running unless `fields` say otherwise."""
    owner = of or a_run()
    made: Raw = {
        "name": names.pod(owner.name, stage, rank),
        "uid": f"pod-{stage}-{attempt}-{rank}",
        "owner_uid": owner.uid,
        "run_digest": owner.run_digest,
        "pod_digest": owner.pod_digest,
        "phase": "Running",
    }
    return Pod(stage=stage, attempt=attempt, rank=rank, **(made | fields))


def raw_pod(rank: int = 0, *, stage: str = "train", attempt: int = 1, status: Raw | None = None) -> Raw:
    """A pod as the API server shows it: what the builder makes, with a uid and a status."""
    built = pods.build(a_run(), Stage(stage), attempt, rank, CONFIG)
    built["metadata"] |= {"uid": f"pod-{stage}-{attempt}-{rank}", "resourceVersion": "1"}
    return built | {"status": {"phase": "Running"} if status is None else status}


def terminated(code: int, message: object = "", *, reason: str = "Error", finished: datetime = NOW) -> Raw:
    """containerStatuses of a trainer that ended; a dict as `message` is a StageResult."""
    words = message if isinstance(message, str) else json.dumps(message)
    state = {"exitCode": code, "reason": reason, "message": words, "finishedAt": text(finished)}
    return {"containerStatuses": [{"name": "trainer", "state": {"terminated": state}}]}


def waiting(reason: str, message: str = "") -> Raw:
    """containerStatuses of a trainer that cannot start."""
    return {"containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": reason, "message": message}}}]}


def result(stage: str, outcome: str = "succeeded", reason: str = "Succeeded", **more: Any) -> Raw:
    """A StageResult as the trainer writes it."""
    return {"stage": stage, "outcome": outcome, "reason": reason, **more}
