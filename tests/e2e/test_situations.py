"""What users of training operators report, on two real nodes: policies of a namespace, wrong defaults, orphans.

All runs share the cluster and go on at the same time, each in a namespace of its own kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from e2e.harness import CHECKPOINT, Platform, condition, stalled, trains
from e2e.holds import Holds
from internvl_api.constants import ANNOTATION_ADOPT, GROUP, PLURAL, VERSION
from internvl_api.status import InternVLFineTuneStatus
from ivft_cluster import helm
from ivft_cluster.shell import wait_for
from ivft_demo.data import write_secret
from ivft_demo.install import Images, chart_values, image_values
from kubernetes import client

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("holds")]

SMALL = {"requests": {"cpu": "50m", "memory": "256Mi"}}
LIMITED = {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}}
STAGES = {"preflight": SMALL, "publish": SMALL}
SHORT = {"maxSteps": 4, "epochs": 2, "globalBatchSize": 4}
LONG = {"maxSteps": 20000, "epochs": 4000, "globalBatchSize": 4}
ALONE: dict[str, Any] = {
    "workers": 1,
    "training": SHORT,
    "podTemplate": {"resources": SMALL, "stageResources": STAGES},
}
LONE_AND_LONG = ALONE | {"training": LONG, "checkpoint": CHECKPOINT}
NOWHERE = "localhost/nowhere:1"
SHARING = ("sharing-one", "sharing-two")  # no name of another test: outputs follow names


@pytest.fixture(scope="module")
def settings(platform: Platform, images: Images) -> Callable[..., None]:
    """Upgrade the operator's release to other values of the chart."""

    def upgrade(**trainer: Any) -> None:
        values = chart_values(images, retryCapSeconds=5)
        values["trainer"] |= trainer
        helm.upgrade(platform.cluster.kubeconfig, values)

    return upgrade


@pytest.fixture(scope="module")
def place(platform: Platform) -> Iterator[Callable[[str], Platform]]:
    """A namespace by name, made when it is first asked for."""
    made: dict[str, Platform] = {}
    with ExitStack() as stack:

        def get(name: str) -> Platform:
            if name not in made:
                namespace = stack.enter_context(platform.cluster.namespace(name))
                write_secret(platform.cluster, namespace)
                made[name] = Platform(platform.cluster, namespace)
            return made[name]

        yield get
        for each in made.values():
            each.delete_all()


@pytest.fixture(scope="module")
def wrong_image(place: Callable[[str], Platform], settings: Callable[..., None]) -> str:
    """The message about a run that began while the chart named an image which does not exist; corrected since."""
    settings(image=image_values(NOWHERE))
    try:
        place("image").apply("quickstart", "default-image", **ALONE)
        status = place("image").wait("default-image", "without an image", lambda s: stalled(s) == "ImagePullFailed")
    finally:
        settings()
    return condition(status, "Stalled")


@pytest.fixture(scope="module", autouse=True)
def begun(place: Callable[[str], Platform], wrong_image: str, holds: Holds) -> None:
    """All runs at once, because each of them mostly waits."""
    core = place("limits").core
    quota = {"hard": {"limits.cpu": "8", "limits.memory": "16Gi"}}
    core.create_namespaced_resource_quota(place("limits").namespace, {"metadata": {"name": "team"}, "spec": quota})
    default = [{"type": "Container", "default": {"memory": "256Mi"}}]
    core.create_namespaced_limit_range(
        place("range").namespace, {"metadata": {"name": "small"}, "spec": {"limits": default}}
    )
    core.create_namespaced_resource_quota(
        place("half").namespace, {"metadata": {"name": "pods"}, "spec": {"hard": {"pods": "1"}}}
    )
    place("limits").apply("quickstart", "refused", **ALONE)
    place("range").apply("quickstart", "ranged", workers=1, training=SHORT, podTemplate={"resources": SMALL})
    missing = {"train": {"photographs": {"annotation": "pvc://nowhere/train.jsonl"}}}
    place("life").apply("quickstart", "claimless", **ALONE | {"data": missing})
    place("life").apply("quickstart", "orphaned", **LONE_AND_LONG)
    for name in SHARING:
        place("half").apply(
            "quickstart", name, training=SHORT | {"globalBatchSize": 8}, podTemplate=ALONE["podTemplate"]
        )


def step(status: InternVLFineTuneStatus) -> int:
    return (status.progress.step if status.progress else None) or 0


def succeeded(platform: Platform, name: str) -> InternVLFineTuneStatus:
    return platform.wait(name, "Succeeded", lambda status: status.phase == "Succeeded")


def test_slow_clients_of_a_workers_metrics_leave_no_traceback_in_its_log(place: Callable[[str], Platform]) -> None:
    team = place("life")
    team.wait("orphaned", "training", trains)
    rude = (
        "import socket, struct, time\n"
        "for path in ('metrics', 'progress') * 10:\n"
        "    s = socket.create_connection(('127.0.0.1', 9400))\n"
        "    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n"
        "    s.sendall(f'GET /{path} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'.encode())\n"
        "    s.close()\n"
    )
    team.cluster.kubectl("exec", "-n", team.namespace, "orphaned-train-0", "--", "python3", "-c", rude)
    before = team.wait("orphaned", "training", trains)
    later = team.wait("orphaned", "going on", lambda status: step(status) > step(before))
    assert later.attempt == 1
    log = team.core.read_namespaced_pod_log("orphaned-train-0", team.namespace)
    assert "Traceback" not in log
    assert "BrokenPipe" not in log


def test_orphans_are_named_at_once_and_adopted_with_their_pods(place: Callable[[str], Platform]) -> None:
    team = place("life")
    team.wait("orphaned", "training", trains)
    before = {pod.metadata.name: pod.metadata.uid for pod in team.pods("orphaned")}
    resource = (GROUP, VERSION, team.namespace, PLURAL, "orphaned")
    team.custom.delete_namespaced_custom_object(*resource, propagation_policy="Orphan")
    wait_for("the run is gone", lambda: not team.children("orphaned") and gone(team, "orphaned"), timeout=120)
    team.apply("quickstart", "orphaned", **LONE_AND_LONG)
    status = team.wait("orphaned", "told", lambda status: stalled(status) == "NameTaken", timeout=60)
    message = condition(status, "Stalled")
    for name in (
        "Pod orphaned-preflight-0",
        "Pod orphaned-train-0",
        "Service ivft-orphaned",
        "ConfigMap ivft-orphaned",
    ):
        assert name in message
    assert "orphaned, as an earlier run 'orphaned' was deleted with --cascade=orphan" in message
    team.custom.patch_namespaced_custom_object(*resource, {"metadata": {"annotations": {ANNOTATION_ADOPT: "true"}}})
    team.wait("orphaned", "training", trains, timeout=60)
    after = {pod.metadata.name: pod.metadata.uid for pod in team.pods("orphaned")}
    assert after == before, "the same pods go on"
    assert any(each.startswith("Adopted: ") for each in team.events("orphaned"))
    assert team.kubectl_ivft("wait", "orphaned", "--timeout", "1s").returncode == 5
    # the pod under the new uid takes over at once what the adopted pod under the old uid holds
    adopted_at = checkpoint(team, "orphaned")
    team.core.delete_namespaced_pod("orphaned-train-0", team.namespace, grace_period_seconds=0)
    again = team.wait("orphaned", "training again", lambda status: status.attempt == 2 and trains(status))
    assert checkpoint(team, "orphaned") >= adopted_at
    assert again.restarts.user == 0
    team.delete("orphaned")


def checkpoint(platform: Platform, name: str) -> int:
    found = platform.custom.get_namespaced_custom_object(GROUP, VERSION, platform.namespace, PLURAL, name)
    return int(found["status"].get("checkpoint", {}).get("step", 0))


def gone(platform: Platform, name: str) -> bool:
    try:
        platform.custom.get_namespaced_custom_object(GROUP, VERSION, platform.namespace, PLURAL, name)
    except client.ApiException as error:
        return bool(error.status == 404)
    return False


def test_a_quota_on_limits_names_the_setting_and_the_corrected_run_succeeds(place: Callable[[str], Platform]) -> None:
    team = place("limits")
    status = team.wait("refused", "refused", lambda status: stalled(status) == "ResourcesMissing")
    message = condition(status, "Stalled")
    assert "ResourceQuota 'team' of namespace" in message
    assert "limits.cpu, limits.memory: set spec.podTemplate.stageResources.preflight" in message
    assert status.stage == "preflight"
    assert status.attempt == 1
    assert not status.progress_text, "nothing of it has run"
    team.change("refused", runPolicy={"suspend": True})
    held = team.kubectl_ivft("wait", "refused", "--timeout", "60s")
    assert held.returncode == 4, held
    resumed = team.kubectl_ivft("resume", "refused")
    assert "from its beginning" in resumed.stdout
    assert "checkpoint" not in resumed.stdout
    team.change("refused", podTemplate={"resources": LIMITED, "stageResources": None})
    done = succeeded(team, "refused")
    assert (done.restarts.user, done.restarts.infrastructure) == (0, 0)
    (preflight,) = team.pods("refused", stage="preflight")
    assert preflight.spec.containers[0].resources.limits["memory"] == "4Gi", "the workers' limit, or the stage's least"


def test_a_limit_range_below_a_stages_request_names_the_setting(place: Callable[[str], Platform]) -> None:
    team = place("range")
    status = team.wait("ranged", "refused", lambda status: stalled(status) == "LimitRangeViolated")
    message = condition(status, "Stalled")
    assert "a LimitRange of namespace" in message
    assert "set requests and limits in spec.podTemplate.stageResources.preflight" in message
    stages = dict.fromkeys(("preflight", "publish"), LIMITED)
    team.change("ranged", podTemplate={"resources": LIMITED, "stageResources": stages})
    done = succeeded(team, "ranged")
    assert (done.restarts.user, done.restarts.infrastructure) == (0, 0)


def test_a_corrected_default_image_reaches_a_run_that_waits_for_it(
    place: Callable[[str], Platform], wrong_image: str
) -> None:
    assert wrong_image.startswith("the chart's trainer.image (spec.podTemplate.image is not set): pod default-image-")
    assert NOWHERE in wrong_image
    done = succeeded(place("image"), "default-image")
    assert (done.restarts.user, done.restarts.infrastructure) == (0, 0)


def test_a_missing_claim_is_named_with_its_field(place: Callable[[str], Platform]) -> None:
    status = place("life").wait("claimless", "without its claim", lambda status: stalled(status) == "ClaimMissing")
    message = condition(status, "Stalled")
    assert message.startswith("spec.data.train.photographs.annotation: PersistentVolumeClaim 'nowhere' of namespace")
    why = place("life").kubectl_ivft("why", "claimless")
    assert "create that PersistentVolumeClaim, or correct its name" in why.stdout


def test_two_runs_whose_quota_has_room_for_one_group_both_succeed(
    place: Callable[[str], Platform], holds: Holds
) -> None:
    team = place("half")
    # room for half a group at first
    in_vain = wait_for("the quota has refused a part of a group", lambda: holds.in_vain(team.namespace, size=2))
    team.core.patch_namespaced_resource_quota("pods", team.namespace, {"spec": {"hard": {"pods": "2"}}})
    print(f"\n{len(in_vain)} workers of refused groups existed for {max(in_vain):.1f} s at most")
    for name in SHARING:
        done = succeeded(team, name)
        assert (done.restarts.user, done.restarts.infrastructure) == (0, 0)
        team.delete(name)
