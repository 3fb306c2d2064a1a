"""The API server without nodes, and the fake kubelet that plays them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ivft_cluster.api_server import ApiServer
from ivft_cluster.fake_kubelet import Behaviour, Exit, FakeKubelet, Run, Unschedulable, Waiting
from ivft_cluster.shell import wait_for
from kubernetes.client.exceptions import ApiException

pytestmark = pytest.mark.integration


@pytest.fixture
def namespace(api_server: ApiServer) -> Iterator[str]:
    with api_server.namespace() as name:
        yield name


def pod(name: str, **metadata: object) -> dict[str, object]:
    container = {"name": "main", "image": "any"}
    return {"metadata": {"name": name, **metadata}, "spec": {"restartPolicy": "Never", "containers": [container]}}


def test_garbage_of_a_deleted_owner_is_collected(api_server: ApiServer, namespace: str) -> None:
    owner = api_server.core.create_namespaced_config_map(namespace, {"metadata": {"name": "owner"}})
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner.metadata.uid}
    api_server.core.create_namespaced_service(
        namespace,
        {"metadata": {"name": "child", "ownerReferences": [reference]}, "spec": {"ports": [{"port": 80}]}},
    )
    api_server.core.delete_namespaced_config_map("owner", namespace)
    wait_for("the child is gone", lambda: is_gone(lambda: api_server.core.read_namespaced_service("child", namespace)))


def test_data_survive_a_restart_of_the_api_server(api_server: ApiServer, namespace: str) -> None:
    api_server.core.create_namespaced_config_map(namespace, {"metadata": {"name": "kept"}, "data": {"a": "1"}})
    api_server.restart_apiserver()
    assert api_server.core.read_namespaced_config_map("kept", namespace).data == {"a": "1"}


def test_pods_run_and_end_as_told(api_server: ApiServer, namespace: str) -> None:
    with FakeKubelet(api_server.api) as kubelet:
        for name in ("good", "bad"):
            api_server.core.create_namespaced_pod(namespace, pod(name))
        addresses = {kubelet.wait_phase(namespace, name).status.pod_ip for name in ("good", "bad")}
        assert len(addresses) == 2
        kubelet.finish(namespace, "good")
        kubelet.finish(namespace, "bad", exit_code=65, message="row 3 has no image")
        assert kubelet.wait_phase(namespace, "good", "Succeeded")
        ended = kubelet.wait_phase(namespace, "bad", "Failed").status.container_statuses[0].state.terminated
        assert (ended.exit_code, ended.message) == (65, "row 3 has no image")


def test_deleted_pods_go_away(api_server: ApiServer, namespace: str) -> None:
    with FakeKubelet(api_server.api) as kubelet:
        api_server.core.create_namespaced_pod(namespace, pod("short-lived"))
        kubelet.wait_phase(namespace, "short-lived")
        api_server.core.delete_namespaced_pod("short-lived", namespace)
        wait_for(
            "the pod is gone", lambda: is_gone(lambda: api_server.core.read_namespaced_pod("short-lived", namespace))
        )


@pytest.mark.parametrize(
    ("fate", "phase", "shown"),
    [
        pytest.param(Run(), "Running", "running", id="run"),
        pytest.param(Exit(0), "Succeeded", "Completed", id="succeed"),
        pytest.param(Exit(137, reason="OOMKilled"), "Failed", "OOMKilled", id="out-of-memory"),
        pytest.param(Unschedulable(), "Pending", "Unschedulable", id="unschedulable"),
        pytest.param(Waiting("ErrImagePull"), "Pending", "ErrImagePull", id="no-image"),
    ],
)
def test_each_fate_has_the_status_of_a_real_kubelet(
    api_server: ApiServer, namespace: str, fate: Behaviour, phase: str, shown: str
) -> None:
    with FakeKubelet(api_server.api, behaviour=lambda _: fate) as kubelet:
        api_server.core.create_namespaced_pod(namespace, pod("one"))

        def reasons() -> set[str]:
            status = kubelet.wait_phase(namespace, "one", phase).status
            states = [each.state for each in status.container_statuses or []]
            found = {condition.reason for condition in status.conditions or []}
            found |= {(state.waiting or state.terminated).reason for state in states if not state.running}
            return found | {"running" for state in states if state.running}

        wait_for(f"the pod says {shown}", lambda: shown in reasons(), timeout=20)


def is_gone(read: object) -> bool:
    try:
        read()  # type: ignore[operator]
    except ApiException as error:
        return bool(error.status == 404)
    return False
