"""The operator's process and PodGroups on a real API server, with volcano's own schema of them; no scheduler runs."""

from pathlib import Path
from typing import Any

import pytest
from controller.operator_process import POD_GROUPS, Cluster, OperatorProcess
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import wait_for

pytestmark = pytest.mark.integration
GROUP, VERSION, PLURAL = POD_GROUPS


def test_a_pod_group_is_made_mended_and_goes_with_its_run(
    volcano: Any, cluster_of_test: Cluster, kubelet: FakeKubelet, tmp_path: Path
) -> None:
    def found() -> dict[str, Any]:
        items = volcano.list_namespaced_custom_object(GROUP, VERSION, cluster_of_test.namespace, PLURAL)["items"]
        return {item["metadata"]["name"]: item["spec"] for item in items}

    with OperatorProcess(cluster_of_test, tmp_path, GANG_SCHEDULERS="volcano") as operator:
        cluster_of_test.create(scheduling={"gang": "volcano", "queue": "research"})
        kubelet.wait_phase(cluster_of_test.namespace, "run-preflight-0")
        assert found() == {"ivft-run-preflight": {"minMember": 1, "queue": "research"}}
        pod = cluster_of_test.core.read_namespaced_pod("run-preflight-0", cluster_of_test.namespace)
        assert pod.metadata.annotations["scheduling.k8s.io/group-name"] == "ivft-run-preflight"
        assert pod.spec.scheduler_name == "volcano"
        volcano.patch_namespaced_custom_object(
            GROUP, VERSION, cluster_of_test.namespace, PLURAL, "ivft-run-preflight", {"spec": {"minMember": 7}}
        )
        wait_for("it is mended", lambda: found()["ivft-run-preflight"]["minMember"] == 1)
        assert operator.metric("internvl_operator_watch_age_seconds", kind="PodGroup.scheduling.volcano.sh") < 3600
        cluster_of_test.delete()
        wait_for("it went with its run", lambda: not found(), timeout=90)
