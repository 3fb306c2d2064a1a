"""What `helm test` runs: `python -m internvl_operator.release_check`, with the rights of a ServiceAccount of its own.

It asks the API server to accept a run and to refuse wrong ones (both as a dry run), sees that the operator takes in a
suspended run, which has no pods, and where a spec is given carries out a run with it. Each run is deleted at the end.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from internvl_api.constants import API_VERSION, KIND
from internvl_api.status import UNOBSERVED, Condition
from kubernetes.config import ConfigException

from internvl_operator.core.conditions import is_true
from internvl_operator.core.run import read_status
from internvl_operator.core.telemetry import printable
from internvl_operator.kube.client import Api, ApiError

PREFIX = "INTERNVL_CHECK_"
_TIMEOUT = 30.0  # seconds of one request, and until the operator takes in a run
_PAUSE = 2.0  # seconds between two looks at a run

Raw = dict[str, Any]
SPEC: Raw = {
    "model": {"name": "InternVL2-1B"},
    "data": {"train": {"check": {"annotation": "s3://internvl-check/train.jsonl"}}},
    "output": "s3://internvl-check/output",
    "runPolicy": {"suspend": True},
}
BY_SCHEMA = {"workers": 0}
BY_WEBHOOK = {"output": "s3://internvl-check/../output"}


class CheckFailed(Exception):
    """A check failed; the message says what was found, what was expected, and the next step."""


@dataclass(frozen=True)
class Check:
    """What to check, and where.

    Attributes:
        name: of the run that is made and deleted.
        spec: of a run to carry out; None to leave that out.
        webhook: whether the webhook must answer.
        timeout: seconds that the run may take.
    """

    namespace: str
    name: str
    spec: Raw | None = None
    webhook: bool = False
    timeout: float = 600.0

    @classmethod
    def from_env(cls, env: dict[str, str]) -> "Check":
        """The settings that the chart writes."""
        return cls(
            namespace=env[f"{PREFIX}NAMESPACE"],
            name=env[f"{PREFIX}NAME"],
            spec=json.loads(env.get(f"{PREFIX}RUN", "null")) or None,
            webhook=env.get(f"{PREFIX}WEBHOOK") == "true",
            timeout=float(env.get(f"{PREFIX}TIMEOUT", "600")),
        )

    def run(self, **changes: object) -> Raw:
        """A run to create; `changes` go to its spec."""
        metadata = {"name": self.name, "namespace": self.namespace}
        return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": {**SPEC, **changes}}


class Cluster:
    """The API server as a check sees it. `sleep` and `clock` are those of `time`."""

    def __init__(self, api: Api, sleep: Callable[[float], None], clock: Callable[[], float]) -> None:
        self._api, self._sleep, self._clock = api, sleep, clock

    def refusal(self, run: Raw) -> str:
        """Why the API server would not take a run; "" when it would. Raises ApiError when it does not answer."""
        try:
            self._api.create(run, dry_run=True)
        except ApiError as error:
            if error.status in (400, 422):
                return error.message
            raise
        return ""

    def create(self, run: Raw) -> None:
        """Create a run, in place of one that an interrupted check left behind."""
        self.remove(run["metadata"])
        self._api.create(run)

    def remove(self, metadata: Raw) -> None:
        """Delete the run of a name, and wait until it is gone."""
        namespace, name = metadata["namespace"], metadata["name"]
        found = self._api.find(KIND, namespace, name)
        if found is None:
            return
        self._api.delete(KIND, namespace, name, uid=found["metadata"]["uid"], force=False)
        gone = "the run is deleted"
        self.wait(gone, _TIMEOUT, lambda: self._api.find(KIND, namespace, name) is None, lambda: "it is still there")

    def status(self, check: Check) -> Raw:
        """The recorded status of the check's run; empty without any."""
        found = self._api.find(KIND, check.namespace, check.name) or {}
        return found.get("status") or {}

    def wait(self, what: str, seconds: float, done: Callable[[], bool], found: Callable[[], str]) -> None:
        """Wait until `done`. Raises CheckFailed with what is found when the time is over."""
        end = self._clock() + seconds
        while not done():
            if self._clock() >= end:
                raise CheckFailed(f"{what}: not after {seconds:.0f} s; {found()}")
            self._sleep(_PAUSE)


def checks(check: Check, cluster: Cluster) -> Iterator[str]:
    """One line for each check that has passed. Raises CheckFailed, ApiError."""
    if refused := cluster.refusal(check.run()):
        raise CheckFailed(f"a valid run is refused: {refused}")
    yield "the API server accepts a valid run"
    if "workers" not in cluster.refusal(check.run(**BY_SCHEMA)):
        raise CheckFailed("a run with 0 workers is accepted; the CRD is not this release's, see crds.install")
    yield "the schema refuses an invalid run"
    if check.webhook:
        if "spec.output" not in cluster.refusal(check.run(**BY_WEBHOOK)):
            raise CheckFailed("a run that only the webhook refuses is accepted; its Service or certificate is wrong")
        yield "the webhook refuses an invalid run"
    metadata = check.run()["metadata"]
    try:
        cluster.create(check.run())
        cluster.wait("the operator takes in a run", _TIMEOUT, lambda: _is_seen(cluster.status(check)), _not_seen)
        yield "the operator takes in a run"
        if check.spec is not None:
            cluster.create(check.run() | {"spec": check.spec})
            yield from _carried_out(check, cluster)
    except (ApiError, CheckFailed) as first:
        try:
            cluster.remove(metadata)
        except (ApiError, CheckFailed) as second:
            raise CheckFailed(f"{first}; the run {check.name} is left behind: {second}") from first
        raise
    cluster.remove(metadata)
    yield "the run is deleted"


def _carried_out(check: Check, cluster: Cluster) -> Iterator[str]:
    def found() -> list[Condition]:
        return read_status(cluster.status(check)).conditions

    def ready() -> str:
        return "; ".join(f"{each.reason}: {each.message}" for each in found() if each.type == "Ready") or "no status"

    def ended() -> bool:
        return is_true(found(), "Complete") or is_true(found(), "Failed")

    cluster.wait("the run is complete", check.timeout, ended, ready)
    if not is_true(found(), "Complete"):
        raise CheckFailed(f"the run has failed: {ready()}")
    yield f"the run is complete: {ready()}"


def _is_seen(status: Raw) -> bool:
    return bool(status.get("observedGeneration", UNOBSERVED) != UNOBSERVED)


def _not_seen() -> str:
    return "its status is empty; is the operator ready, and does it watch this namespace (watchNamespaces)?"


def main() -> int:
    """The exit code: 0 when every check has passed, 1 with a message on stderr."""
    check = Check.from_env(dict(os.environ))
    try:
        cluster = Cluster(Api.connect(timeout=_TIMEOUT, connections=2), time.sleep, time.monotonic)
        for line in checks(check, cluster):
            print(f"ok: {printable(line)}", flush=True)
    except (ApiError, CheckFailed, ConfigException) as error:
        print(f"failed: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
