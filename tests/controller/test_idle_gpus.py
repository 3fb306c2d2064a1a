"""How long GPUs are held while nothing trains, for each class of failure; docs/reliability.md has the table."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from controller.builders import CONFIG, Raw, a_run, result, text, waiting
from controller.gpu_cluster import VirtualCluster
from internvl_operator.core.resources import pods
from internvl_operator.core.stages import Stage
from internvl_operator.kube.client import ApiError
from ivft_cluster.paths import CHECKOUT

BEYOND = 60.0  # seconds that may pass beyond the configured deadlines
GRACE = 120.0  # terminationGracePeriodSeconds, which a worker uses up when it does not react to SIGTERM
RENDEZVOUS = 600.0  # the trainer's own limit
NOTICED = 50.0  # until Kubernetes taints a silent node

Break = Callable[[VirtualCluster], None]


def tolerated() -> float:
    """Seconds for which a worker tolerates the taint of a node that is lost."""
    made = pods.build(a_run(), Stage("train"), 1, 0, CONFIG)["spec"]["tolerations"]
    return float(next(each["tolerationSeconds"] for each in made if each["key"].endswith("unreachable")))


TOLERATED = tolerated()


@dataclass(frozen=True)
class Case:
    """A class of failure: what happens, and the deadlines that the user, the trainer or Kubernetes set for it."""

    name: str
    happens: Break
    bounded_by: str = ""
    deadline: float = 0.0
    policy: dict[str, Any] = field(default_factory=dict)
    from_start: bool = False  # it happens before training, and again in each attempt
    goes_on: bool = True  # training starts again


def quota(cluster: VirtualCluster, most: int) -> None:
    """Let at most so many training pods exist that have not ended."""

    def refuse(obj: Raw) -> ApiError | None:
        name = obj["metadata"]["name"]
        if obj["kind"] != "Pod" or "-train-" not in name or name in cluster.server.pods:
            return None
        ended = {pod for pod, raw in cluster.server.pods.items() if raw["status"]["phase"] in ("Succeeded", "Failed")}
        used = sum("-train-" in pod for pod in cluster.server.pods.keys() - ended)
        text = f'pods "{name}" is forbidden: exceeded quota: team, used: pods={used}, limited: pods={most}'
        return ApiError(403, "Forbidden", text) if used >= most else None

    cluster.server.refuse = refuse


def half_a_quota(cluster: VirtualCluster) -> None:
    quota(cluster, 1)
    cluster.at(1200, lambda: quota(cluster, 2))


def no_second_node(cluster: VirtualCluster) -> None:
    cluster.fits = lambda pod: pod != "run-train-1"
    cluster.at(1200, lambda: setattr(cluster, "fits", lambda pod: True))


def second_worker_starts(cluster: VirtualCluster, status: Raw) -> None:
    """Worker 1 has this status for the first twenty minutes."""
    started: Raw = {"phase": "Running", "containerStatuses": []}
    cluster.start = lambda pod: status if pod == "run-train-1" else started
    cluster.at(1200, lambda: setattr(cluster, "start", lambda pod: started))


def no_image(cluster: VirtualCluster) -> None:
    second_worker_starts(cluster, waiting("ImagePullBackOff", "Back-off pulling image"))


def no_volume(cluster: VirtualCluster) -> None:
    sandbox = {"type": "PodReadyToStartContainers", "status": "False"}
    second_worker_starts(cluster, {"conditions": [sandbox], **waiting("ContainerCreating")})


def slow_image(cluster: VirtualCluster) -> None:
    second_worker_starts(cluster, waiting("ContainerCreating"))
    cluster.at(70, lambda: setattr(cluster, "start", lambda pod: {"phase": "Running", "containerStatuses": []}))


def no_rendezvous(cluster: VirtualCluster) -> None:
    """The workers run and do not meet; each gives up after its limit. The next attempt meets."""
    cluster.meets = lambda run: False
    words = result("train", "failed", "RendezvousTimeout", message="did not meet the others")

    def give_up() -> None:
        for pod in cluster.pods():
            cluster.exit(pod, 69, words)
        cluster.meets = lambda run: True

    cluster.until(lambda: len(cluster.pods()) == 2)
    cluster.at(11 + RENDEZVOUS, give_up)


def a_deleted_worker(cluster: VirtualCluster) -> None:
    cluster.server.remove("Pod", "run-train-1")


def a_failed_worker(cluster: VirtualCluster) -> None:
    cluster.exit("run-train-1", 1, "boom")
    lost = result("train", "failed", "PeerLost", message="a peer is gone")
    cluster.at(3, lambda: cluster.exit("run-train-0", 1, lost))


def a_failed_worker_and_a_peer_that_hangs(cluster: VirtualCluster) -> None:
    cluster.hangs = lambda pod: True
    cluster.exit("run-train-1", 1, "boom")


def out_of_memory(cluster: VirtualCluster) -> None:
    cluster.exit("run-train-1", 137, reason="OOMKilled")


def a_full_gpu(cluster: VirtualCluster) -> None:
    cluster.exit("run-train-1", 1, result("train", "failed", "GpuOutOfMemory", message="CUDA out of memory"))


def denied_storage(cluster: VirtualCluster) -> None:
    cluster.exit("run-train-0", 77, result("train", "failed", "AccessDenied", message="s3://out: 403"))


def a_drained_node(cluster: VirtualCluster) -> None:
    cluster.server.drain("run-train-1")


def a_lost_node(cluster: VirtualCluster) -> None:
    """Power off: Kubernetes taints the node, then deletes its pod; the peer hangs in a collective."""
    cluster.dead = {cluster.server.pods["run-train-1"]["metadata"]["uid"]}
    cluster.hangs = lambda pod: True

    def taint() -> None:
        lost = cluster.server.pods.get("run-train-1")
        if lost and "deletionTimestamp" not in lost["metadata"]:
            cluster.server.drain("run-train-1", "DeletionByTaintManager")

    cluster.at(NOTICED + TOLERATED, taint)


def no_progress(cluster: VirtualCluster) -> None:
    cluster.hangs = lambda pod: True
    first = {raw["metadata"]["uid"] for raw in cluster.server.pods.values()}

    def meets(run: str) -> bool:
        return not first & {cluster.server.pods[pod]["metadata"]["uid"] for pod in cluster.pods(run)}

    cluster.meets = meets


def suspended(cluster: VirtualCluster) -> None:
    cluster.server.edit_spec(runPolicy={"suspend": True})


def suspended_while_invalid(cluster: VirtualCluster) -> None:
    cluster.server.edit_spec(workers=3, runPolicy={"suspend": True})


def past_its_deadline(cluster: VirtualCluster) -> None:
    cluster.server.edit_spec(runPolicy={"activeDeadlineSeconds": 1})


def a_sidecar(cluster: VirtualCluster) -> None:
    """Training ends, and a container beside the trainer runs on."""
    ended = [{"name": "trainer", "state": {"terminated": {"exitCode": 0, "finishedAt": text(cluster.server.now)}}}]
    for pod in cluster.pods():
        cluster.server.set_pod(pod, {"containerStatuses": [*ended, {"name": "proxy", "state": {"running": {}}}]})


CASES = (
    Case("a quota admits one of two workers", half_a_quota, from_start=True),
    Case(
        "one worker finds no node", no_second_node, "schedulingDeadlineSeconds: 60", 60,
        {"schedulingDeadlineSeconds": 60}, from_start=True,
    ),
    Case(
        "one worker's image cannot be pulled", no_image, "startDeadlineSeconds: 120", 120,
        {"startDeadlineSeconds": 120}, from_start=True,
    ),
    Case(
        "one worker's volume is missing", no_volume, "startDeadlineSeconds: 120", 120,
        {"startDeadlineSeconds": 120}, from_start=True,
    ),
    Case(
        "one worker's image takes a minute longer", slow_image, "startDeadlineSeconds: 120", 120,
        {"startDeadlineSeconds": 120}, from_start=True,
    ),
    Case(
        "the workers do not meet", no_rendezvous, "the trainer's limit for the rendezvous: 600", RENDEZVOUS,
        from_start=True,
    ),
    Case("a worker is deleted", a_deleted_worker),
    Case("a worker fails, its peer notices", a_failed_worker),
    Case(
        "a worker fails, its peer hangs", a_failed_worker_and_a_peer_that_hangs,
        "terminationGracePeriodSeconds: 120", GRACE,
    ),
    Case("a worker exceeds its memory limit", out_of_memory),
    Case("a GPU is out of memory", a_full_gpu, goes_on=False),
    Case("the storage refuses access", denied_storage),
    Case("a node is drained", a_drained_node),
    Case(
        "a node loses power, the peer hangs", a_lost_node,
        f"Kubernetes notices: 50, tolerationSeconds: {TOLERATED:.0f}, terminationGracePeriodSeconds: 120",
        NOTICED + TOLERATED + GRACE,
    ),
    Case(
        "training makes no progress, all workers hang", no_progress,
        "progressDeadlineSeconds: 120, terminationGracePeriodSeconds: 120", 120 + GRACE,
        {"progressDeadlineSeconds": 120},
    ),
    Case("the run is suspended", suspended, goes_on=False),
    Case("the run is suspended while its spec is invalid", suspended_while_invalid, goes_on=False),
    Case("the run exceeds activeDeadlineSeconds", past_its_deadline, goes_on=False),
    Case("a sidecar runs on after training", a_sidecar, "grace for sidecars: 30", 30, goes_on=False),
)  # fmt: skip


def measure(case: Case) -> tuple[float, float]:
    """(longest hold without training in seconds, all such GPU-seconds) from the failure to training or the end."""
    cluster = VirtualCluster(runPolicy=case.policy)
    if not case.from_start:
        cluster.until(cluster.trains)
        cluster.report(41)
        cluster.run_for(30)
        cluster.forget_idle()
    case.happens(cluster)
    if case.goes_on:
        if not case.from_start:
            assert not cluster.trains()
        cluster.until(cluster.trains)
    else:
        cluster.run_for(1800)
        assert cluster._held("run") == 0
    return cluster.idle["run"].longest, cluster.idle["run"].gpu_seconds


def page_rows() -> list[str]:
    page = (CHECKOUT / "docs/reliability.md").read_text(encoding="utf-8")
    header = "| failure | bounded by (s) | longest hold (s) | GPU-seconds |\n|---|---|---|---|\n"
    return page.partition(header)[2].partition("\n\n")[0].splitlines()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name.replace(" ", "-")) for case in CASES])
def test_no_gpu_is_held_for_long_while_nothing_trains_and_the_page_says_how_long(case: Case) -> None:
    longest, gpu_seconds = measure(case)
    assert longest <= case.deadline + BEYOND
    assert f"| {case.name} | {case.bounded_by or '—'} | {longest:.0f} | {gpu_seconds:.0f} |" in page_rows()


def test_the_page_has_every_failure() -> None:
    assert [line.split(" | ")[0].removeprefix("| ") for line in page_rows()] == [case.name for case in CASES]


def test_two_runs_that_each_get_half_a_group_from_a_quota_hold_no_gpus_and_both_train() -> None:
    cluster = VirtualCluster("one", "two")
    quota(cluster, 2)
    admitted, refused = cluster.server.refuse, set[str]()

    def refuse(obj: Raw) -> ApiError | None:
        """The quota admits the first worker of each run and refuses the second one."""
        name = obj["metadata"]["name"]
        if name.endswith("-train-1") and name not in refused:
            refused.add(name)
            return ApiError(403, "Forbidden", f'pods "{name}" is forbidden: exceeded quota: team')
        return admitted(obj)

    cluster.server.refuse = refuse
    cluster.until(lambda: cluster.trains("one") or cluster.trains("two"))
    assert refused == {"one-train-1", "two-train-1"}
    first, second = ("one", "two") if cluster.trains("one") else ("two", "one")
    cluster.run_for(600)
    assert cluster.trains(first)
    assert cluster.idle[second].longest <= 30
    for pod in cluster.pods(first):
        cluster.exit(pod, 0, result("train"))
    cluster.until(lambda: cluster.trains(second))
    assert max(idle.longest for idle in cluster.idle.values()) <= 30
