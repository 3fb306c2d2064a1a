"""Groups with fewer workers than the spec asks for: when they shrink, when they grow, and what that costs."""

from itertools import pairwise
from typing import Any

import pytest
import yaml
from controller.builders import NOW, Raw, a_run, at, custom_resource, member, text
from controller.fake_server import clock
from controller.simulator import Operator, World
from controller.test_partial_groups import quota
from controller.test_start_deadlines import place, unscheduled
from internvl_api.constants import KIND
from internvl_api.status import CheckpointStatus, ElasticStatus, InternVLFineTuneStatus, Progress, StageStatus
from internvl_operator.core import group_size
from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.observe import Observed
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.policies import elastic, oom_policy
from internvl_operator.core.resources import gang
from internvl_operator.core.run import read_run, read_status
from internvl_operator.core.stages import Stage
from internvl_operator.kubectl_ivft.render import run_status
from internvl_operator.metrics import RunCollector
from rich.console import Console

TRAIN = Stage("train")
THREE: Raw = {"workers": 3, "minWorkers": 1, "training": {"globalBatchSize": 12, "microBatchSize": 2}}
POLICY: Raw = {"schedulingDeadlineSeconds": 30, "growAfterSeconds": 600}


def smaller(workers: int = 2, **fields: Any) -> ElasticStatus:
    known = {
        "wanted": 3,
        "reason": "WorkersReduced",
        "message": "no node",
        "grow_at": text(NOW),
        "checkpoint_step": 100,
    }
    return ElasticStatus(workers=workers, **(known | fields))


def context(
    known: ElasticStatus | None, *, step: int = 200, eta: float | None = None, **changes: Any
) -> ReconcileContext:
    """A run that trains with as many workers as `known` says, and whose newest checkpoint has this step."""
    spec = THREE | {"runPolicy": POLICY} | changes
    status = InternVLFineTuneStatus(
        attempt=2,
        stages=[
            StageStatus(name="preflight", state="Succeeded"),
            StageStatus(name="train", state="Running", attempt=2),
        ],
        checkpoint=CheckpointStatus(step=step, uri="s3://out/run/checkpoints/x", sha256="0", verified_at=text(NOW)),
        progress=Progress(stage="train", step=step, eta_seconds=eta),
        elastic=known,
        run_digest=a_run(**spec).run_digest,
    )
    run = read_run(custom_resource(status=status.to_dict(), **spec))
    size = group_size.sized(run).spec.workers
    pods = tuple(member(rank, attempt=2, of=run) for rank in range(size))
    return ReconcileContext.begin(run, Observed(pods=pods), NOW, OperatorConfig())


@pytest.mark.parametrize(
    ("workers", "least", "room", "expected"),
    [
        (3, 1, 3, 3),
        (3, 1, 2, 2),
        (3, 2, 1, None),
        (3, 1, 0, None),
        (6, 1, 5, 3),  # 12 samples in micro batches of 2 cannot be shared by 5 or 4 workers
        (6, 1, 4, 3),
        (6, 1, 9, 6),
        (3, None, 2, None),
    ],
)
def test_the_largest_number_of_workers_with_a_whole_share_of_the_batch(
    workers: int, least: int | None, room: int, expected: int | None
) -> None:
    changes = THREE | {"workers": workers} | ({"minWorkers": least} if least else {})
    spec = a_run(**{key: value for key, value in changes.items() if least or key != "minWorkers"}).spec
    assert group_size.fitting(spec, workers, room) == expected


@pytest.mark.parametrize(
    ("known", "room", "size", "failed", "wait"),
    [
        pytest.param(None, 2, 2, 0, 600, id="at first"),
        pytest.param(None, 3, None, 0, 0, id="room for all"),
        pytest.param(None, 0, None, 0, 0, id="room for none"),
        pytest.param(smaller(2), 1, 1, 0, 600, id="smaller still"),
        pytest.param(smaller(2, failed_growths=1), 1, 1, 1, 1200, id="smaller still, after a failed try"),
        pytest.param(smaller(3, growing_from=2), 2, 2, 1, 1200, id="a failed try to grow"),
        pytest.param(smaller(3, growing_from=2, failed_growths=4), 2, 2, 5, 19_200, id="the fifth failed try"),
        pytest.param(smaller(3, growing_from=2, failed_growths=500), 2, 2, 501, 86_400, id="at most a day"),
        pytest.param(smaller(3, growing_from=1, failed_growths=4), 2, 2, 0, 600, id="a try that grew in part"),
    ],
)
def test_what_a_group_without_room_does(
    known: ElasticStatus | None, room: int, size: int | None, failed: int, wait: int
) -> None:
    decision = elastic.reduced(context(known), TRAIN, room, "no node")
    if size is None or decision is None:
        assert decision is None
        assert size is None
        return
    found = decision.record["elastic"]
    assert isinstance(found, ElasticStatus)
    assert decision.outcome is not None
    assert (decision.outcome.kind, decision.outcome.budget) == ("resume", "none")
    assert (found.workers, found.wanted, found.failed_growths, found.checkpoint_step) == (size, 3, failed, 200)
    assert found.grow_at == text(at(wait))
    assert f"no node; train goes on with {size} of 3 workers" in found.message


@pytest.mark.parametrize(
    ("known", "more", "grows"),
    [
        pytest.param(smaller(), {}, True, id="time and a new checkpoint have come"),
        pytest.param(smaller(), {"step": 100}, False, id="no checkpoint since"),
        pytest.param(smaller(checkpoint_step=None), {"step": 0}, True, id="the first checkpoint"),
        pytest.param(smaller(grow_at=text(at(1))), {}, False, id="too early"),
        pytest.param(smaller(grow_at=text(at(10**8))), {}, True, id="a time of a wrong clock"),
        pytest.param(smaller(), {"eta": 500.0}, False, id="training ends soon"),
        pytest.param(smaller(), {"eta": 5000.0}, True, id="training ends later"),
        pytest.param(smaller(grow_at=None), {}, False, id="a queue would give its place away"),
        pytest.param(None, {}, False, id="it has all workers"),
    ],
)
def test_when_a_smaller_group_tries_all_workers(known: ElasticStatus | None, more: Raw, grows: bool) -> None:
    decision = elastic.growth(context(known, **more), TRAIN)
    assert (decision.outcome is not None) == grows
    if grows:
        tried = decision.record["elastic"]
        assert isinstance(tried, ElasticStatus)
        assert (tried.workers, tried.growing_from) == (3, 2)


def test_a_run_in_a_queue_does_not_grow() -> None:
    queued = context(None, scheduling={"gang": "kueue", "queue": "team"})
    decision = elastic.reduced(queued, TRAIN, 2, "not admitted")
    assert decision is not None
    found = decision.record["elastic"]
    assert isinstance(found, ElasticStatus)
    assert found.grow_at is None


# --- stories


class Elastic(World):
    """A run that wants three workers, before training."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**(THREE | {"runPolicy": POLICY} | changes))
        self.pass_stage("preflight")

    def give_nodes(self, nodes: int) -> None:
        """The scheduler places so many workers; the others find no node."""
        for rank, pod in enumerate(self.pods("train")):
            if rank < nodes:
                place(self, pod, {"phase": "Running"})
            else:
                self.server.set_pod(pod, unscheduled())
        self.operator.settle()

    def shrink_to(self, nodes: int) -> None:
        self.give_nodes(nodes)
        self.later(30)
        self.collect()

    def save_checkpoint(self, step: int) -> None:
        """Worker 0 reports it, which also ends a series of failures."""
        saved = CheckpointStatus(step=step, uri="s3://out/x", sha256="0", verified_at=text(self.server.now))
        self.server.change(KIND, "run", lambda raw: raw["status"].update(checkpoint=saved.to_dict(), failures=0))
        self.operator.settle()

    @property
    def run_config(self) -> Any:
        return yaml.safe_load(self.server.objects["ConfigMap"]["ivft-run"]["data"]["run.yaml"])

    def world_sizes(self) -> set[str]:
        env = [raw["spec"]["containers"][0]["env"] for name, raw in self.server.pods.items() if "-train-" in name]
        return {item["value"] for items in env for item in items if item["name"] == "WORLD_SIZE"}

    def reasons(self) -> list[str]:
        return [reason for _, reason, _ in self.server.events if reason.startswith("Workers")]


def test_a_run_starts_with_the_workers_that_have_room() -> None:
    world = Elastic()
    world.shrink_to(2)
    assert world.pods("train") == ["run-train-0", "run-train-1"]
    assert world.world_sizes() == {"2"}
    assert (world.run_config["workers"], world.run_config["gradientAccumulation"]) == (2, 3)
    world.give_nodes(2)
    assert world.status["phase"] == "Running"
    assert "2 of 2 workers run (spec.workers: 3)" in world.server.condition("Ready")["message"]
    assert world.status["elastic"]["workers"] == 2
    assert "Insufficient nvidia.com/gpu" in world.status["elastic"]["message"]
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
    assert world.reasons() == ["WorkersReduced"]


def test_it_never_has_fewer_workers_than_the_least() -> None:
    world = Elastic(minWorkers=2)
    world.give_nodes(1)
    world.later(30)
    assert world.server.condition("Stalled")["reason"] == "SchedulingDeadlineExceeded"
    world.collect()
    world.later(60)
    assert len(world.pods("train")) == 3
    assert world.reasons() == []


def test_without_a_deadline_of_its_own_it_waits_a_minute() -> None:
    world = Elastic(runPolicy={})
    world.give_nodes(2)
    world.later(59)
    assert world.status["attempt"] == 1
    world.later(1)
    world.collect()
    assert len(world.pods("train")) == 2


def test_it_goes_on_with_fewer_after_a_node_is_lost_and_grows_back_at_a_checkpoint() -> None:
    world = Elastic()
    world.give_nodes(3)
    world.save_checkpoint(10)
    world.end("train", 137, ranks=(2,))  # the node of worker 2, and its peers end too
    world.end("train", 75, ranks=(0, 1))
    world.collect()
    world.shrink_to(2)
    world.give_nodes(2)
    assert world.status["workers"]["active"] == 2
    world.later(601)
    assert world.reasons() == ["WorkersReduced"]
    attempt = world.status["attempt"]
    world.save_checkpoint(20)
    assert world.status["attempt"] == attempt + 1
    world.collect()
    assert len(world.pods("train")) == 3
    assert world.world_sizes() == {"3"}
    assert world.run_config["gradientAccumulation"] == 2
    world.give_nodes(3)
    assert world.status["phase"] == "Running"
    assert "elastic" not in world.status
    assert world.reasons() == ["WorkersReduced", "WorkersGrowing", "WorkersRestored"]


def test_a_try_to_grow_that_fails_returns_to_the_smaller_group_and_waits_longer() -> None:
    world = Elastic()
    world.shrink_to(2)
    world.give_nodes(2)
    tries: list[float] = []
    began = world.server.now
    for step in range(1, 60):
        attempt = world.status["attempt"]
        world.later(300)
        world.save_checkpoint(step)
        if world.status["attempt"] == attempt:
            continue
        tries.append((world.server.now - began).total_seconds())
        world.collect()
        assert len(world.pods("train")) == 3
        world.shrink_to(2)
        world.give_nodes(2)
        assert world.status["phase"] == "Running"
        assert world.status["workers"]["active"] == 2
        assert world.status["checkpoint"]["step"] == step
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert [round(pause / 600) for pause in pauses] == [2, 4, 8]  # each failed try doubles the wait
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_a_try_whose_new_worker_never_starts_returns_to_the_smaller_group() -> None:
    world = Elastic(runPolicy=POLICY | {"startDeadlineSeconds": 100})
    world.shrink_to(2)
    world.give_nodes(2)
    world.later(601)
    world.save_checkpoint(1)
    world.collect()
    for rank, pod in enumerate(world.pods("train")):
        starts = {"phase": "Pending", "startTime": text(world.server.now)}
        place(world, pod, {"phase": "Running"} if rank < 2 else starts)
    world.later(100)
    world.collect()
    assert len(world.pods("train")) == 2
    assert world.status["elastic"]["failedGrowths"] == 1
    assert "did not start within 100 s" in world.status["elastic"]["message"]


def test_a_quota_that_admits_two_of_three_starts_two() -> None:
    world = World(**(THREE | {"runPolicy": POLICY}))
    quota(world.server, 2)
    world.pass_stage("preflight")
    world.collect()
    assert len(world.pods("train")) == 2
    world.run("train")
    assert world.status["phase"] == "Running"
    assert world.status["elastic"]["reason"] == "QuotaExceeded"
    assert "exceeded quota: team" in world.status["elastic"]["message"]


def test_a_quota_below_the_least_stalls_as_before() -> None:
    world = World(**(THREE | {"runPolicy": POLICY, "minWorkers": 2}))
    quota(world.server, 1)
    world.pass_stage("preflight")
    assert world.server.condition("Stalled")["reason"] == "QuotaExceeded"
    assert "elastic" not in world.status


def test_a_queue_that_does_not_admit_the_group_is_asked_for_less_down_to_the_least() -> None:
    world = Elastic(minWorkers=2, scheduling={"gang": "kueue", "queue": "team"})

    def wait_in_queue() -> None:
        for pod in world.pods("train"):
            world.server.set_pod(pod, unscheduled("SchedulingGated", "gated"))
        world.operator.settle()
        world.later(31)
        world.collect()

    wait_in_queue()
    assert len(world.pods("train")) == 2
    attempt = world.status["attempt"]
    for _ in range(3):
        wait_in_queue()
    assert (len(world.pods("train")), world.status["attempt"]) == (2, attempt)


def test_the_scheduler_has_its_own_time_after_a_long_queue() -> None:
    world = Elastic(minWorkers=2, scheduling={"gang": "kueue", "queue": "team"})
    for pod in world.pods("train"):
        world.server.set_pod(pod, unscheduled("SchedulingGated", "gated"))
    world.operator.settle()
    world.later(29)
    for pod in world.pods("train"):
        world.server.set_pod(pod, {"phase": "Pending", "conditions": []})
    world.operator.settle()
    world.later(29)
    assert world.status["attempt"] == 1, "the queue has admitted all"
    world.later(1)
    assert world.server.condition("Stalled")["reason"] == "SchedulingDeadlineExceeded"


@pytest.mark.parametrize("code", [0, 70])
def test_a_finished_run_misses_no_worker(code: int) -> None:
    world = Elastic()
    world.shrink_to(2)
    world.give_nodes(2)
    world.end("train", code)
    if code == 0:
        world.pass_stage("publish")
    assert world.status["phase"] == ("Failed" if code else "Succeeded")
    assert "elastic" not in world.status
    assert world.reasons() == ["WorkersReduced"]


@pytest.mark.parametrize("change", [{"workers": 6}, {"runPolicy": {"suspend": True}}])
def test_a_changed_number_of_workers_and_a_suspension_ask_for_all_again(change: Raw) -> None:
    world = Elastic()
    world.shrink_to(2)
    world.give_nodes(2)
    world.server.change(KIND, "run", lambda raw: raw["spec"].update(change))
    world.operator.settle()
    assert "elastic" not in world.status


def test_a_restarted_operator_keeps_the_smaller_group() -> None:
    world = Elastic()
    world.shrink_to(2)
    world.give_nodes(2)
    world.operator = Operator(world.server)
    clock(world.server, 5)
    world.operator.settle()
    assert world.status["phase"] == "Running"
    assert len(world.pods("train")) == 2


def test_a_pod_group_needs_the_least_workers_only() -> None:
    (train,) = gang.pod_groups(a_run(**(THREE | {"minWorkers": 2, "scheduling": {"gang": "volcano"}})), TRAIN)
    assert train["spec"]["minMember"] == 2


def test_a_halved_micro_batch_stays_small_when_the_share_of_a_worker_grows() -> None:
    spec = {"workers": 3, "minWorkers": 2, "training": {"globalBatchSize": 30, "microBatchSize": 5}}
    known = smaller(2, wanted=3)
    run = context(known, **spec).run
    status = InternVLFineTuneStatus(micro_batch_size=2)
    config = yaml.safe_load(oom_policy.run_yaml(run, status))
    batch = config["training"]["microBatchSize"], config["gradientAccumulation"], config["workers"]
    assert batch == (1, 15, 2)  # 15 samples of a worker cannot be shared by micro batches of 2


def test_status_and_metrics_tell_of_the_missing_worker(capsys: pytest.CaptureFixture[str]) -> None:
    world = Elastic()
    world.shrink_to(2)
    Console(width=200).print(run_status(world.server.objects[KIND]["run"], world.server.now))
    assert "2 of 3 workers (WorkersReduced): pod run-train-2 found no node within 30 s" in capsys.readouterr().out
    families = RunCollector(lambda: [("team", "run", read_status(world.status))]).collect()
    found = [
        each.value for family in families for each in family.samples if each.name == "internvl_job_missing_workers"
    ]
    assert found == [1]
