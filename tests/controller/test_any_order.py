"""Whatever happens in whatever order, with caches that lag and an operator that may die between any two writes:
attempts are never mixed, every end of an attempt is counted once, and in the end the run completes."""

import contextlib
from collections.abc import Callable

import pytest
from controller.builders import custom_resource, result, terminated
from controller.fake_server import Killed, Server, clock
from controller.simulator import Operator
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from internvl_api.constants import KIND, LABEL_ATTEMPT, LABEL_STAGE
from internvl_operator.kube.client import ApiError

pytestmark = pytest.mark.slow

KINDS = ("Pod", "Service", "ConfigMap", "NetworkPolicy", KIND)


class AnyOrder(RuleBasedStateMachine):
    """A group of two under a kubelet, a user and an operator that take turns at random."""

    @initialize(training=st.booleans())
    def begin(self, training: bool) -> None:
        self.server = Server()
        self.server.create(custom_resource(workers=2, runPolicy={"backoffLimit": 100, "infrastructureLimit": 1000}))
        self.operator = Operator(self.server)
        self.failed: set[tuple[str, str]] = set()  # (stage, attempt) in which a pod was made to fail
        self.lost: set[tuple[str, str]] = set()  # … and in which one was taken away
        self.drained: set[tuple[str, str]] = set()  # … or had to give way, which costs nothing
        if training:
            self.operator.settle()
            self.server.set_pod("run-preflight-0", {"phase": "Succeeded", **terminated(0)})
            self.operator.settle()

    # --- the operator

    @rule(kind=st.sampled_from(KINDS), events=st.integers(1, 4))
    def hear_a_little(self, kind: str, events: int) -> None:
        self.operator.hear(kind, events)

    @rule()
    def hear_and_pass(self) -> None:
        self.operator.hear()
        self.operator.run_pass()

    @rule()
    def pass_with_what_is_known(self) -> None:
        self.operator.run_pass()

    @rule(writes=st.integers(0, 6), answered=st.booleans())
    def die_in_a_pass_and_start_again(self, writes: int, answered: bool) -> None:
        self.operator.hear()
        with self._interrupted(writes, Killed(), after=answered), contextlib.suppress(Killed):
            self.operator.run_pass()
        self.operator = Operator(self.server)

    @rule(writes=st.integers(0, 6))
    def lose_an_answer(self, writes: int) -> None:
        with self._interrupted(writes, ApiError(0, "Disconnected", "the answer never came"), after=True):
            self.operator.run_pass()

    # --- the cluster

    @rule(index=st.integers(0, 5))
    def a_pod_runs(self, index: int) -> None:
        self._report(index, ("Pending",), {"phase": "Running"})

    @rule(index=st.integers(0, 5))
    def a_pod_succeeds(self, index: int) -> None:
        self._report(index, ("Running",), {"phase": "Succeeded", **terminated(0, finished=self.server.now)})

    @rule(index=st.integers(0, 5))
    def a_pod_fails(self, index: int) -> None:
        if name := self._report(index, ("Running",), {"phase": "Failed", **terminated(1, finished=self.server.now)}):
            self.failed.add(self._attempt(name))

    @rule(index=st.integers(0, 5))
    def a_pod_is_lost(self, index: int) -> None:
        if name := self._pod(index):
            self.lost.add(self._attempt(name))
            self.server.remove("Pod", name)

    @rule(index=st.integers(0, 5))
    def a_user_deletes_a_pod(self, index: int) -> None:
        if name := self._pod(index):
            self.lost.add(self._attempt(name))
            self.server.delete("Pod", "team", name, uid=self.server.pods[name]["metadata"]["uid"], force=False)

    @rule(index=st.integers(0, 5))
    def a_node_is_drained(self, index: int) -> None:
        if name := self._pod(index):
            self.drained.add(self._attempt(name))
            self.server.drain(name)

    @rule()
    def kubelets_end_deleted_pods(self) -> None:
        self.server.evict_deleted()

    @rule(seconds=st.integers(1, 60))
    def time_passes(self, seconds: int) -> None:
        clock(self.server, seconds)

    # --- what must hold

    @invariant()
    def attempts_are_never_mixed(self) -> None:
        if hasattr(self, "server"):
            for stage in ("preflight", "train", "publish"):
                assert len(self.server.attempts(stage)) <= 1

    @invariant()
    def no_end_is_counted_twice(self) -> None:
        if hasattr(self, "server") and (status := self.server.status()):
            assert sum(status["restarts"].values()) <= len(self.failed | self.lost | self.drained)
            assert status["restarts"]["user"] <= len(self.failed)

    @precondition(lambda self: hasattr(self, "server"))
    @rule()
    def nothing_made_is_foreign(self) -> None:
        assert set(self.server.objects["Service"]) <= {"ivft-run"}
        assert set(self.server.objects["ConfigMap"]) <= {"ivft-run"}

    def teardown(self) -> None:
        if hasattr(self, "server"):
            self._let_it_finish()
            status = self.server.status()
            assert status["phase"] == "Succeeded"
            # every attempt but the last ended once, and each end is in the books
            ended = status["attempt"] - 1
            assert ended - len(self.drained) <= sum(status["restarts"].values()) <= ended
            assert status["restarts"]["user"] >= len(self.failed - self.lost - self.drained)

    # --- helpers

    def _let_it_finish(self) -> None:
        self.operator = Operator(self.server)
        for _ in range(200):
            self.operator.settle()
            if self.server.status()["phase"] == "Succeeded":
                return
            self.server.evict_deleted()
            for name, raw in list(self.server.pods.items()):
                if raw["status"]["phase"] in ("Pending", "Running"):
                    stage = raw["metadata"]["labels"][LABEL_STAGE]
                    self.server.set_pod(name, {"phase": "Succeeded", **terminated(0, result(stage))})
            clock(self.server, 400)
        raise AssertionError(f"the run does not end: {self.server.status()}")

    def _pod(self, index: int) -> str | None:
        """A pod of a stage that is not done: what becomes of the others concerns nobody."""
        status = self.server.status()
        done = {e["name"] for e in status.get("stages", ()) if e["state"] == "Succeeded"}
        names = [n for n, raw in self.server.pods.items() if raw["metadata"]["labels"][LABEL_STAGE] not in done]
        return names[index] if index < len(names) else None

    def _report(self, index: int, phases: tuple[str, ...], status: dict[str, object]) -> str | None:
        name = self._pod(index)
        if name is None or self.server.pods[name]["status"]["phase"] not in phases:
            return None
        self.server.set_pod(name, status)
        return name

    def _attempt(self, name: str) -> tuple[str, str]:
        labels = self.server.pods[name]["metadata"]["labels"]
        return labels[LABEL_STAGE], labels[LABEL_ATTEMPT]

    @contextlib.contextmanager
    def _interrupted(self, writes: int, error: BaseException, *, after: bool):  # type: ignore[no-untyped-def]
        left = writes

        def count() -> None:
            nonlocal left
            if left == 0:
                left = -1
                raise error
            left -= 1

        hook = "after_write" if after else "before_write"
        idle: Callable[[], None] = getattr(self.server, hook)
        setattr(self.server, hook, count)
        try:
            yield
        finally:
            setattr(self.server, hook, idle)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
