"""`kubectl ivft wait`: it returns for every end of a run, and its exit code names the end."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
from controller.builders import Raw, custom_resource
from internvl_operator.kubectl_ivft.client import Runs, Unreachable, UserError
from internvl_operator.kubectl_ivft.wait import end_of, wait


def run_in(phase: str, message: str = "", *, generation: int = 1, observed: int = 1, uid: str = "") -> Raw:
    ready = {
        "type": "Ready",
        "status": "False",
        "reason": "R",
        "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    raw = custom_resource(
        generation=generation, status={"phase": phase, "observedGeneration": observed, "conditions": [ready]}
    )
    raw["metadata"]["uid"] = uid or raw["metadata"]["uid"]
    return raw


class Cluster:
    """Answers `get` from a list; an exception in it is raised. Time passes with each pause."""

    def __init__(self, *answers: Raw | Exception) -> None:
        self.answers: Iterator[Raw | Exception] = iter(answers)
        self.now, self.told = 0.0, list[str]()

    def get(self, name: str) -> Raw:
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, timeout: float | None = None) -> int:
        return wait(
            cast(Runs, self), "run", timeout=timeout, tell=self.told.append, clock=lambda: self.now, pause=self.pause
        )


@pytest.mark.parametrize(("phase", "code"), [("Succeeded", 0), ("Failed", 3), ("Suspended", 4)])
def test_the_exit_code_names_the_end(phase: str, code: int) -> None:
    cluster = Cluster(run_in("Running", "train: 1 of 2"), run_in("Running", "train: 1 of 2"), run_in(phase, "over"))
    assert cluster.wait() == code
    assert cluster.told == ["Running, train: 1 of 2", f"{phase}, over"]


def test_an_end_of_an_earlier_spec_is_not_the_end() -> None:
    assert end_of(run_in("Failed", generation=2, observed=1)) is None
    assert (
        Cluster(run_in("Failed", generation=2, observed=1), run_in("Succeeded", generation=2, observed=2)).wait() == 0
    )


def test_a_run_without_status_is_waited_for() -> None:
    assert Cluster(custom_resource(), run_in("Succeeded")).wait() == 0


def test_the_timeout() -> None:
    assert Cluster(*[run_in("Running")] * 10).wait(timeout=5) == 5


def test_a_short_outage_of_the_api_server_is_survived_and_a_long_one_is_not() -> None:
    away = Unreachable("away")
    assert Cluster(run_in("Running"), *[away] * 5, run_in("Succeeded")).wait() == 0
    with pytest.raises(Unreachable):
        Cluster(run_in("Running"), *[away] * 100).wait()


@pytest.mark.parametrize(
    "later", [UserError("no run 'run'"), run_in("Succeeded", uid="another")], ids=["deleted", "another-run"]
)
def test_a_deleted_run_is_an_error(later: Any) -> None:
    with pytest.raises(UserError, match=r"no run|was deleted"):
        Cluster(run_in("Running"), later).wait()
