"""The operator's process against a real API server; nodes are played by the test."""

import http.server
import json
import math
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest
from controller.builders import Raw, result
from controller.operator_process import Cluster, OperatorProcess
from controller.story import Story
from internvl_api.constants import LABEL_ATTEMPT, METRICS_PORT
from ivft_cluster.fake_kubelet import Run, Waiting
from ivft_cluster.releases import binary
from ivft_cluster.shell import wait_for

pytestmark = pytest.mark.integration


def test_a_run_from_apply_to_published(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    assert cluster.children() == {
        "Pod": ["run-preflight-0", "run-train-0", "run-train-1"],
        "Service": ["ivft-run"],
        "ConfigMap": ["ivft-run"],
    }
    status = run.to_the_end()
    assert status["artifacts"] == {"adapter": "s3://out/run/artifacts/adapter"}
    assert status["phase"] == "Succeeded"
    assert cluster.wait_condition("Ready")["reason"] == "Published"
    found = cluster.get()
    assert found["metadata"]["generation"] == 1  # spec was never written to
    assert "finalizers" not in found["metadata"]
    assert "annotations" not in found["metadata"]
    assert operator.metric("internvl_operator_jobs", phase="Succeeded") == 1
    assert operator.metric("internvl_operator_first_pod_seconds_count") == 1
    events = cluster.core.list_namespaced_event(cluster.namespace).items
    assert {"StageStarted", "StageSucceeded", "Published"} <= {event.reason for event in events}


def test_steady_state_writes_nothing(run: Story, operator: OperatorProcess) -> None:
    run.cluster.create()
    run.to_training()
    wait_for("the operator is idle", lambda: _idle(operator))
    writes = operator.metric("internvl_operator_api_writes_total")
    passes = operator.metric("internvl_operator_reconcile_seconds_count")
    run.cluster.patch({"metadata": {"annotations": {"touched": "yes"}}})
    body = {"metadata": {"annotations": {"touched": "yes"}}}
    run.cluster.core.patch_namespaced_pod("run-train-0", run.cluster.namespace, body)
    wait_for("two more passes", lambda: operator.metric("internvl_operator_reconcile_seconds_count") >= passes + 2)
    assert operator.metric("internvl_operator_api_writes_total") == writes


def test_a_deleted_worker_restarts_the_group_as_a_new_attempt(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    cluster.core.delete_namespaced_pod("run-train-1", cluster.namespace)
    run.training(attempt=2)
    status = run.to_the_end()
    assert status["restarts"] == {"user": 0, "infrastructure": 1}
    assert operator.metric("internvl_operator_restarts_total", cause="infrastructure") == 1
    _assert_attempts_never_mixed(cluster)


def test_a_killed_operator_goes_on_where_it_was(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    operator.kill()
    run.kubelet.finish(cluster.namespace, "run-train-0", message=json.dumps(result("train")))
    run.kubelet.finish(cluster.namespace, "run-train-1", message=json.dumps(result("train")))
    operator.start()
    run.finish("run-publish-0", "publish")
    cluster.wait_condition("Complete")
    assert cluster.get()["status"]["attempt"] == 1
    pods = cluster.history(cluster.core.list_namespaced_pod)
    made = Counter(pod.metadata.name for kind, pod in pods if kind == "ADDED")
    assert made == {"run-preflight-0": 1, "run-train-0": 1, "run-train-1": 1, "run-publish-0": 1}
    for listing in (cluster.core.list_namespaced_service, cluster.core.list_namespaced_config_map):
        assert [kind for kind, _ in cluster.history(listing)].count("ADDED") == 1


def test_a_worker_lost_while_the_operator_was_away(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    operator.kill()
    cluster.core.delete_namespaced_pod("run-train-1", cluster.namespace)
    wait_for("worker 1 is gone", lambda: "run-train-1" not in cluster.pods())
    operator.start()
    run.training(attempt=2)
    assert run.to_the_end()["restarts"] == {"user": 0, "infrastructure": 1}
    _assert_attempts_never_mixed(cluster)


def test_the_operator_ends_cleanly_when_told_to(run: Story, operator: OperatorProcess) -> None:
    run.cluster.create()
    run.cluster.wait("it works", lambda status: status["attempt"])
    assert operator.terminate() == 0


def test_a_wrong_spec_is_explained_and_makes_nothing(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create(model={"name": "InternVL2-1B", "source": "hf://OpenGVLab/InternVL2-2B"})
    stalled = cluster.wait_condition("Stalled", "InvalidSpec")
    assert "spec.model.source: found hf://OpenGVLab/InternVL2-2B, which holds InternVL2-2B" in stalled["message"]
    assert "set model.name to InternVL2-2B" in stalled["message"]
    assert not any(cluster.children().values())
    cluster.edit({"model": {"name": "InternVL2-2B"}})
    run.kubelet.wait_phase(cluster.namespace, "run-preflight-0")


def test_suspend_and_resume(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    cluster.edit({"runPolicy": {"suspend": True}})
    cluster.wait_condition("Suspended")
    wait_for("the workers are gone", lambda: cluster.pods() == ["run-preflight-0"])
    cluster.edit({"runPolicy": {"suspend": False}})
    run.training(attempt=2)
    assert run.to_the_end()["restarts"] == {"user": 0, "infrastructure": 0}


def test_what_is_said_is_said_of_the_newest_spec(run: Story, operator: OperatorProcess) -> None:
    """`kubectl wait` and GitOps tools take no word about an earlier generation, also of a run that is over."""
    cluster = run.cluster
    cluster.create()
    run.to_training()
    run.to_the_end()
    cluster.edit({"runPolicy": {"backoffLimit": 5}})
    generation = cluster.get()["metadata"]["generation"]
    status = cluster.wait("it is looked at", lambda status: status["observedGeneration"] == generation)
    assert {condition["observedGeneration"] for condition in status["conditions"]} == {generation}
    words = ["-n", cluster.namespace, "wait", "--for=condition=Complete", "--timeout=10s", "ivft/run"]
    subprocess.run(
        [str(binary("kubectl")), f"--kubeconfig={cluster.server.kubeconfig}", *words], check=True, timeout=60
    )


def test_a_missing_secret_is_named_and_the_run_goes_on_when_it_is_there(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    run.kubelet.behaviour = lambda pod: Waiting("CreateContainerConfigError", 'secret "s3-credentials" not found')
    cluster.create()
    stalled = cluster.wait_condition("Stalled", "SecretMissing")
    assert "spec.secrets.objectStorage" in stalled["message"]
    assert cluster.namespace in stalled["message"]
    run.kubelet.behaviour = lambda pod: Run()
    run.kubelet.start(cluster.namespace, "run-preflight-0")  # the kubelet has found the Secret
    run.to_training()


def test_what_preflight_finds_is_told_and_tried_again_until_it_is_mended(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create()
    words = "s3://data/train.jsonl:7: image photos/7.jpg is truncated"
    run.finish("run-preflight-0", "preflight", 65, reason="BadRow", message=words)
    stalled = cluster.wait_condition_seen("Stalled", "BadRow")
    assert words in stalled["message"]
    assert "run-train-0" not in cluster.pods()
    cluster.wait("a second try", lambda status: status["attempt"] == 2 and status["phase"] == "Running")
    run.to_training(attempt=2)
    assert run.to_the_end()["restarts"] == {"user": 0, "infrastructure": 0}


def test_what_the_api_server_refuses_reaches_the_user(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create(podTemplate={"nodeSelector": {"not a label!": "x"}})
    stalled = cluster.wait_condition("Stalled")
    assert "not a label!" in stalled["message"]
    assert stalled["reason"] == "InvalidChild"
    cluster.edit({"podTemplate": {"nodeSelector": None}})
    run.kubelet.wait_phase(cluster.namespace, "run-preflight-0")


def test_a_run_made_again_under_the_same_name_starts_afresh(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    first = cluster.create()["metadata"]["uid"]
    run.to_training()
    cluster.delete()
    second = cluster.create()["metadata"]["uid"]
    cluster.wait("preflight runs again", lambda status: (status["stage"], status["phase"]) == ("preflight", "Running"))
    pod = cluster.core.read_namespaced_pod("run-preflight-0", cluster.namespace)
    assert pod.metadata.owner_references[0].uid == second != first


@pytest.mark.parametrize(
    ("kind", "name", "body"),
    [
        pytest.param("service", "ivft-run", {"spec": {"ports": [{"port": 29500}]}}, id="service"),
        pytest.param("config_map", "ivft-run", {"data": {"mine": "an apply would see no conflict"}}, id="config-map"),
        pytest.param("pod", "run-preflight-0", {"spec": {"containers": [{"name": "c", "image": "i"}]}}, id="pod"),
    ],
)
def test_a_foreign_object_of_the_same_name_is_not_taken_over(
    run: Story, operator: OperatorProcess, kind: str, name: str, body: Raw
) -> None:
    cluster = run.cluster
    create, read, delete = (getattr(cluster.core, f"{verb}_namespaced_{kind}") for verb in ("create", "read", "delete"))
    create(cluster.namespace, {"metadata": {"name": name}} | body)
    cluster.create()
    stalled = cluster.wait_condition("Stalled", "NameTaken")
    assert name in stalled["message"]
    found = read(name, cluster.namespace).metadata
    assert (found.owner_references, found.labels) == (None, None)
    delete(name, cluster.namespace, grace_period_seconds=0, _preload_content=False)
    cluster.wait("preflight runs", lambda status: status["phase"] == "Running")


def test_orphans_are_named_at_once_and_adopted_on_request(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    before = {pod: cluster.core.read_namespaced_pod(pod, cluster.namespace).metadata.uid for pod in cluster.pods()}
    cluster.delete(propagation_policy="Orphan")  # as `kubectl delete --cascade=orphan`
    cluster.wait_gone()
    cluster.create()
    stalled = cluster.wait_condition("Stalled", "NameTaken")
    for words in ("orphaned", "ConfigMap ivft-run", "Service ivft-run", "Pod run-train-1"):
        assert words in stalled["message"]
    cluster.patch({"metadata": {"annotations": {"internvl.dev/adopt": "true"}}})
    cluster.wait("training goes on", lambda status: (status.get("stage"), status["phase"]) == ("train", "Running"))
    pods = [cluster.core.read_namespaced_pod(pod, cluster.namespace).metadata for pod in cluster.pods()]
    assert {pod.name: pod.uid for pod in pods} == before
    assert {pod.owner_references[0].uid for pod in pods} == {cluster.get()["metadata"]["uid"]}


def test_progress_is_copied_into_status(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    address = cluster.core.read_namespaced_pod("run-train-0", cluster.namespace).status.pod_ip
    said = {"stage": "train", "step": 120, "totalSteps": 400, "loss": 1.234}
    checkpoint = {"step": 100, "uri": "s3://out/100", "sha256": "0", "verifiedAt": "2026-01-31T12:00:00Z"}
    with _serving(address, said | {"checkpoint": checkpoint}):
        status = cluster.wait("the step is told", lambda status: status.get("progressText") == "120/400 loss 1.234")
    assert status["progress"] == said
    assert status["checkpoint"] == checkpoint
    assert operator.metric("internvl_job_step", job_name="run") == 120
    assert operator.metric("internvl_job_loss", job_name="run") == 1.234


def test_figures_that_no_status_can_hold_cost_only_themselves(run: Story, operator: OperatorProcess) -> None:
    """A status with any of them is refused (500), and would keep the run from everything else."""
    cluster = run.cluster
    cluster.create()
    run.to_training()
    pod = cluster.core.read_namespaced_pod("run-train-0", cluster.namespace)
    nasty = {"step": 120, "totalSteps": 10**26, "loss": math.nan, "epoch": math.inf, "detail": "\x1b[31mred\x00"}
    with _serving(pod.status.pod_ip, nasty):
        status = cluster.wait("the step is told", lambda status: status.get("progressText") == "step 120")
    assert status["progress"] == {"step": 120, "detail": "red"}
    words = result("train", checkpoint={"step": math.inf}, evaluation={"final": {"coco": {"CIDEr": math.nan}}})
    for rank in (0, 1):
        run.kubelet.finish(cluster.namespace, f"run-train-{rank}", message=json.dumps(words))
    cluster.wait("training is done", lambda status: status["stage"] == "publish")


def test_the_api_server_may_be_away_for_a_while(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    cluster.server.restart_apiserver()
    wait_for("the API server is back", lambda: cluster.get())
    assert run.to_the_end()["attempt"] == 1


def test_an_operator_for_the_whole_cluster(run: Story, tmp_path: Path) -> None:
    with OperatorProcess(run.cluster, tmp_path, NAMESPACES="") as operator:
        run.cluster.create()
        run.to_training()
        assert operator.metric("internvl_operator_jobs", phase="Running") >= 1


def test_nothing_is_left_of_a_deleted_run(run: Story, operator: OperatorProcess) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    cluster.delete()
    wait_for("the children are gone", lambda: not any(cluster.children().values()))
    wait_for("its metrics are gone", lambda: operator.metric("internvl_operator_jobs") == 0)


def _idle(operator: OperatorProcess) -> bool:
    """No write between two looks that are a pass's length apart."""
    before = operator.metric("internvl_operator_reconcile_seconds_count")
    threading.Event().wait(0.5)
    return operator.metric("internvl_operator_reconcile_seconds_count") == before


def _assert_attempts_never_mixed(cluster: Cluster) -> None:
    """Replay all pod events: at no moment did workers of two attempts exist together."""
    alive: dict[str, str] = {}
    for kind, pod in cluster.history(cluster.core.list_namespaced_pod):
        if pod.metadata.labels["internvl.dev/stage"] != "train":
            continue
        if kind == "DELETED":
            alive.pop(pod.metadata.name, None)
        else:
            alive[pod.metadata.name] = pod.metadata.labels[LABEL_ATTEMPT]
        assert len(set(alive.values())) <= 1


class _serving:
    """A worker's /progress on a loopback address."""

    def __init__(self, address: str, body: Raw) -> None:
        text = json.dumps(body).encode()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/progress" else 404)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer((address, METRICS_PORT), Handler)

    def __enter__(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
