"""How Flux and Argo CD see a run: their own logic, on every version of the object that was ever there."""

from collections.abc import Iterator
from typing import Any

import pytest
from controller.builders import NOW, Raw, custom_resource
from controller.operator_process import Cluster, OperatorProcess
from controller.story import Story
from internvl_api.constants import GROUP, KIND, PLURAL, VERSION
from internvl_api.status import Phase
from internvl_operator.core.conditions import set_condition, summarise
from ivft_cluster.api_server import ApiServer
from ivft_cluster.fake_kubelet import Run, Unschedulable, Waiting
from ivft_cluster.gitops import verdicts
from ivft_cluster.paths import CHECKOUT
from ivft_cluster.releases import binary
from ivft_cluster.shell import run as command
from kubernetes import watch

pytestmark = pytest.mark.integration

PATCH = CHECKOUT / "examples/gitops/argocd-cm.yaml"
KEY = f"resource.customizations.health.{GROUP}_{KIND}"

UNSEEN = ("InProgress", "Progressing")
LEAVING = ("Terminating", "Progressing")
EXPECTED: dict[Phase, tuple[str, str]] = {
    "Pending": ("InProgress", "Progressing"),
    "Running": ("InProgress", "Progressing"),
    "Suspended": ("InProgress", "Suspended"),
    "Stalled": ("Failed", "Degraded"),
    "Succeeded": ("Current", "Healthy"),
    "Failed": ("Failed", "Degraded"),
}
EVERY_STAGE = {
    "method": "lora",
    "evaluation": {"tasks": {"val": {"task": "vqa", "annotation": "s3://data/val.jsonl"}}, "baseline": True},
    "merge": {"formats": ["hf"]},
}
STAGES = {"preflight": 1, "baseline-evaluate": 2, "train": 2, "evaluate": 2, "merge": 1, "publish": 1}


def test_the_page_says_what_is_tested_here() -> None:
    table = (CHECKOUT / "docs/gitops.md").read_text(encoding="utf-8").split("|---|---|---|---|\n")[1].split("\n\n")[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert {phase: (flux, argo) for _, phase, flux, argo in rows if phase != "any"} == EXPECTED
    assert [(flux, argo) for _, phase, flux, argo in rows if phase == "any"] == [UNSEEN, LEAVING]


@pytest.fixture(scope="module")
def script(served: ApiServer) -> Iterator[str]:
    """The health check as it lies in Argo CD's ConfigMap, after what docs/gitops.md says was done."""
    there = {"metadata": {"name": "argocd-cm"}, "data": {"url": "https://argocd.example.org"}}
    with served.namespace("argocd") as namespace:
        served.core.create_namespaced_config_map(namespace, there)
        kubectl = [binary("kubectl"), "--kubeconfig", served.kubeconfig, "-n", namespace]
        command([*kubectl, "patch", "configmap", "argocd-cm", "--patch-file", PATCH])
        data = served.core.read_namespaced_config_map("argocd-cm", namespace).data
        assert data["url"] == "https://argocd.example.org"
        yield data[KEY]


class Judges:
    """Both tools, on the runs of one namespace."""

    def __init__(self, cluster: Cluster, script: str) -> None:
        self.cluster, self._script = cluster, script

    def now(self, name: str = "run") -> tuple[str, str]:
        """Flux's and Argo CD's status of the object as it is."""
        return self.of(self.cluster.get(name))[0]

    def of(self, *objects: Raw) -> list[tuple[str, str]]:
        """Flux's and Argo CD's status of each object."""
        return [(each.flux.status, each.argo.status) for each in verdicts(objects, self._script)]

    def messages(self) -> tuple[str, str]:
        """Flux's and Argo CD's messages for the current object."""
        (both,) = verdicts([self.cluster.get()], self._script)
        return both.flux.message, both.argo.message

    def history(self) -> list[tuple[Raw, tuple[str, str]]]:
        """Every version of the run since the namespace was made, with its verdicts; each must be that of its phase."""
        versions = list(self._versions(until=self.cluster.get()["metadata"]["resourceVersion"]))
        seen = list(zip(versions, self.of(*versions), strict=True))
        wrong = [(raw.get("status"), verdict) for raw, verdict in seen if verdict != expected(raw)]
        assert wrong == []
        return seen

    def _versions(self, until: str) -> Iterator[Raw]:
        stream = watch.Watch().stream(
            self.cluster.runs.list_namespaced_custom_object,
            GROUP,
            VERSION,
            self.cluster.namespace,
            PLURAL,
            resource_version=self.cluster.since,
            timeout_seconds=60,
        )
        for event in stream:
            yield event["object"]
            if event["object"]["metadata"]["resourceVersion"] == until:
                return


def expected(raw: Raw) -> tuple[str, str]:
    """The verdicts expected for the phase in status, or for a status that answers an older spec."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    if "deletionTimestamp" in metadata:
        return LEAVING
    return EXPECTED[status["phase"]] if status.get("observedGeneration") == metadata["generation"] else UNSEEN


def in_turn(seen: list[tuple[Raw, tuple[str, str]]]) -> list[tuple[str, str]]:
    """The verdicts in their order, each once for as long as it lasts."""
    turns = [verdict for _, verdict in seen]
    return [now for before, now in zip([None, *turns], turns, strict=False) if now != before]


@pytest.fixture
def judges(cluster_of_test: Cluster, script: str) -> Judges:
    return Judges(cluster_of_test, script)


def test_a_run_is_healthy_when_it_is_published_and_not_before(
    run: Story, operator: OperatorProcess, judges: Judges
) -> None:
    run.cluster.create(**EVERY_STAGE)
    for stage, size in STAGES.items():
        run.cluster.wait(f"{stage} runs", lambda s, stage=stage: (s["stage"], s["phase"]) == (stage, "Running"))
        assert judges.now() == ("InProgress", "Progressing")
        for rank in range(size):
            run.finish(f"run-{stage}-{rank}", stage)
    run.cluster.wait_condition("Complete")
    assert judges.now() == ("Current", "Healthy")
    assert judges.messages()[1] == "Published: published at s3://out/run"
    seen = judges.history()
    assert {raw["status"]["stage"] for raw, _ in seen if "stage" in raw["status"]} == {*STAGES}
    assert in_turn(seen) == [("InProgress", "Progressing"), ("Current", "Healthy")]


def test_a_run_that_no_operator_has_seen_is_waited_for(cluster_of_test: Cluster, judges: Judges) -> None:
    cluster_of_test.create()
    assert judges.now() == ("InProgress", "Progressing")
    assert "waiting for the operator" in judges.messages()[1]


def test_a_queued_run_is_waited_for(run: Story, operator: OperatorProcess, judges: Judges) -> None:
    run.kubelet.behaviour = lambda pod: Unschedulable()
    run.cluster.create()
    run.cluster.wait_condition("Reconciling", "Unschedulable")
    assert judges.now() == ("InProgress", "Progressing")
    assert all("Insufficient nvidia.com/gpu" in message for message in judges.messages())
    judges.history()


def test_a_restart_is_waited_for(run: Story, operator: OperatorProcess, judges: Judges) -> None:
    run.cluster.create()
    run.to_training()
    run.kubelet.evict(run.cluster.namespace, "run-train-1")
    run.training(attempt=2)
    run.finish("run-train-0", "train", 1, reason="WorkerFailed", message="a bug")
    run.training(attempt=3)
    run.to_the_end()
    assert in_turn(judges.history()) == [("InProgress", "Progressing"), ("Current", "Healthy")]


def test_a_suspended_run_is_suspended_in_argo_cd_and_never_done_for_flux(
    run: Story, operator: OperatorProcess, judges: Judges
) -> None:
    run.cluster.create()
    run.to_training()
    run.cluster.edit({"runPolicy": {"suspend": True}})
    run.cluster.wait("no pod is left", lambda s: "no pod is left" in s["conditions"][0]["message"])
    assert judges.now() == ("InProgress", "Suspended")
    assert all("spec.runPolicy.suspend is true" in message for message in judges.messages())
    run.cluster.edit({"runPolicy": {"suspend": False}})
    run.training(attempt=2)
    assert judges.now() == ("InProgress", "Progressing")
    run.to_the_end()
    assert in_turn(judges.history()) == [
        ("InProgress", "Progressing"),
        ("InProgress", "Suspended"),
        ("InProgress", "Progressing"),
        ("Current", "Healthy"),
    ]


def test_a_mistake_is_told_until_it_is_mended(run: Story, operator: OperatorProcess, judges: Judges) -> None:
    cluster = run.cluster
    cluster.create(model={"name": "InternVL2-1B", "source": "hf://OpenGVLab/InternVL2-2B"})
    cluster.wait_condition("Stalled", "InvalidSpec")
    assert judges.now() == ("Failed", "Degraded")
    assert all("spec.model.source: found hf://OpenGVLab/InternVL2-2B" in message for message in judges.messages())
    operator.kill()
    cluster.edit({"model": {"name": "InternVL2-2B"}})
    assert judges.now() == UNSEEN  # what was said is of the spec before
    operator.start()
    run.to_training()
    assert in_turn(judges.history()) == [UNSEEN, ("Failed", "Degraded"), ("InProgress", "Progressing")]


def test_what_the_cluster_lacks_is_told_until_it_is_there(
    run: Story, operator: OperatorProcess, judges: Judges
) -> None:
    run.kubelet.behaviour = lambda pod: Waiting("CreateContainerConfigError", 'secret "s3-credentials" not found')
    run.cluster.create()
    run.cluster.wait_condition("Stalled", "SecretMissing")
    assert judges.now() == ("Failed", "Degraded")
    run.kubelet.behaviour = lambda pod: Run()
    run.kubelet.start(run.cluster.namespace, "run-preflight-0")
    run.to_training()
    assert judges.now() == ("InProgress", "Progressing")
    judges.history()


def test_a_failed_run_is_degraded_until_its_spec_changes(run: Story, operator: OperatorProcess, judges: Judges) -> None:
    run.cluster.create(runPolicy={"backoffLimit": 0})
    run.to_training()
    run.finish("run-train-0", "train", 1, reason="WorkerFailed", message="a bug")
    run.cluster.wait_condition("Failed", "BackoffLimitExceeded")
    assert judges.now() == ("Failed", "Degraded")
    assert all("backoffLimit" in message for message in judges.messages())
    operator.kill()
    run.cluster.edit({"runPolicy": {"backoffLimit": 1}})
    assert judges.now() == UNSEEN
    operator.start()
    run.training(attempt=2)
    run.to_the_end()
    assert judges.now() == ("Current", "Healthy")
    judges.history()


def test_a_run_that_is_being_deleted_is_leaving(run: Story, operator: OperatorProcess, judges: Judges) -> None:
    run.cluster.create()
    run.to_training()
    run.cluster.patch({"metadata": {"finalizers": ["example.org/hold"]}})
    run.cluster.delete()
    assert judges.now() == LEAVING
    judges.history()
    run.cluster.patch({"metadata": {"finalizers": None}})


def test_a_change_after_the_end_has_no_effect_and_that_is_told(
    run: Story, operator: OperatorProcess, judges: Judges
) -> None:
    cluster = run.cluster
    cluster.create()
    run.to_training()
    run.to_the_end()
    cluster.edit({"training": {"epochs": 2}})
    cluster.wait("the operator has seen it", lambda s: s["observedGeneration"] == 2)
    assert judges.now() == ("Current", "Healthy")
    assert "the spec changed after publishing and has no effect" in judges.messages()[1]
    kubectl = [binary("kubectl"), "--kubeconfig", cluster.server.kubeconfig, "-n", cluster.namespace]
    command([*kubectl, "wait", "--for=condition=Ready", "internvlfinetune/run", "--timeout=20s"])
    cluster.edit({"training": None})
    cluster.wait("it is as it was", lambda s: "has no effect" not in s["conditions"][0]["message"])
    judges.history()


def test_a_bad_row_is_told_while_its_stage_waits_for_another_try(
    run: Story, operator: OperatorProcess, judges: Judges
) -> None:
    run.cluster.create()
    run.finish("run-preflight-0", "preflight", 65, reason="BadRow", message="s3://data/train.jsonl:7: no image")
    run.to_training(attempt=2)
    assert in_turn(judges.history()) == [UNSEEN, ("Failed", "Degraded"), ("InProgress", "Progressing")]


# --- what is hard to reach, or is not the operator's doing


def said(phase: Phase, reason: str, *, of: int = 1, now: int = 1, **more: Any) -> Raw:
    """A run of which the operator has said so about generation `of`."""
    conditions = [each.to_dict() for each in summarise([], phase, reason, "some words", of, NOW)]
    status = {"phase": phase, "observedGeneration": of, "conditions": conditions}
    return custom_resource(generation=now, status=status | more)


def warned() -> Raw:
    """A run that goes on although its memory estimate says that it will not fit."""
    running = summarise([], "Running", "TrainRunning", "2 of 2", 1, NOW)
    bad = running[0].model_copy(update={"type": "MemoryEstimate", "status": "False", "reason": "DoesNotFit"})
    conditions = [each.to_dict() for each in set_condition(running, bad)]
    return custom_resource(status={"phase": "Running", "observedGeneration": 1, "conditions": conditions})


def leaving(raw: Raw) -> Raw:
    raw["metadata"]["deletionTimestamp"] = "2026-01-31T12:00:00Z"
    return raw


def reversed_conditions(raw: Raw) -> Raw:
    raw["status"]["conditions"].reverse()
    return raw


@pytest.mark.parametrize(
    ("raw", "verdict"),
    [
        *(pytest.param(said(phase, "Any"), verdict, id=phase) for phase, verdict in EXPECTED.items()),
        *(pytest.param(said(phase, "Any", now=2), UNSEEN, id=f"{phase}, of an older spec") for phase in EXPECTED),
        *(pytest.param(leaving(said(phase, "Any")), LEAVING, id=f"{phase}, leaving") for phase in EXPECTED),
        *(
            pytest.param(reversed_conditions(said(phase, "Any")), verdict, id=f"{phase}, in another order")
            for phase, verdict in EXPECTED.items()
        ),
        pytest.param(custom_resource(status={"observedGeneration": -1}), UNSEEN, id="new"),
        pytest.param(leaving(custom_resource(status={"observedGeneration": -1})), LEAVING, id="new, leaving"),
        pytest.param(warned(), ("InProgress", "Progressing"), id="will not fit, and goes on"),
    ],
)
def test_verdict_on(raw: Raw, verdict: tuple[str, str], judges: Judges) -> None:
    assert judges.of(raw) == [verdict]


@pytest.mark.parametrize(
    "status",
    [
        pytest.param({"observedGeneration": 1}, id="no conditions"),
        pytest.param({"observedGeneration": 1, "conditions": None}, id="null conditions"),
        pytest.param({"observedGeneration": 1, "conditions": [{"type": "Ready", "status": "Unknown"}]}, id="Unknown"),
        pytest.param({"observedGeneration": 1, "conditions": [{"type": "Other", "status": "True"}]}, id="another's"),
        pytest.param(None, id="no status"),
    ],
)
def test_a_strange_status_never_breaks_the_health_check(status: Raw | None, judges: Judges) -> None:
    ((_, argo),) = judges.of(custom_resource(status=status))
    assert argo == "Progressing"
