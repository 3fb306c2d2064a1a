"""Groups placed all at once: what each scheduler finds on pods and PodGroups, checked against their own schemas."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from controller.builders import CONFIG, UID, Raw, a_run, custom_resource, spec
from controller.fake_server import POD_GROUP, Server, names_of
from controller.simulator import Operator, World
from internvl_api.recipes.resolve import parse_spec
from internvl_api.validation.violations import SpecError
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.resources import gang, names, pods
from internvl_operator.core.stages import Stage
from internvl_operator.kube.client import ApiError, list_path, resource_of
from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parents[1] / "data/crds"
TRAIN, PREFLIGHT = Stage("train"), Stage("preflight")
LABEL_VALUE = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")


def pod(scheduling: Raw, stage: Stage = TRAIN, attempt: int = 1, **changes: Any) -> Raw:
    return pods.build(a_run(scheduling=scheduling, **changes), stage, attempt, 0, CONFIG)


def closed(schema: Raw) -> Raw:
    """A server prunes what a schema does not name: for us, that is a mistake."""
    return schema | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("scheduling", "changes", "version", "spec_of_group"),
    [
        pytest.param({"gang": "volcano"}, {}, "scheduling.volcano.sh/v1beta1", {"minMember": 2}, id="volcano"),
        pytest.param(
            {"gang": "volcano", "queue": "research"},
            {"podTemplate": {"priorityClassName": "high"}},
            "scheduling.volcano.sh/v1beta1",
            {"minMember": 2, "queue": "research", "priorityClassName": "high"},
            id="volcano-with-all-it-takes",
        ),
        pytest.param({"gang": "coscheduling"}, {}, "scheduling.x-k8s.io/v1alpha1", {"minMember": 2}, id="coscheduling"),
    ],
)
def test_the_pod_group_of_a_stage(scheduling: Raw, changes: Raw, version: str, spec_of_group: Raw) -> None:
    (made,) = gang.pod_groups(a_run(scheduling=scheduling, **changes), TRAIN)
    schema = yaml.safe_load((SCHEMAS / f"{scheduling['gang']}-podgroup.yaml").read_text())
    Draft202012Validator(closed(schema)).validate(made["spec"])
    assert (made["apiVersion"], made["kind"], made["spec"]) == (version, "PodGroup", spec_of_group)
    assert resource_of(made) == gang.GROUPS[scheduling["gang"]]
    assert list_path(resource_of(made), "team") == f"/apis/{version}/namespaces/team/podgroups"
    assert made["metadata"]["ownerReferences"][0]["uid"] == UID
    assert made["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "internvl-operator"
    (alone,) = gang.pod_groups(a_run(scheduling=scheduling, **changes), PREFLIGHT)
    assert alone["spec"]["minMember"] == 1
    assert alone["metadata"]["name"] != made["metadata"]["name"]


@pytest.mark.parametrize(("least", "members"), [(None, [2, 1]), (1, [1, 1])], ids=["all", "few"])
def test_how_many_pods_must_start_together(least: int | None, members: list[int]) -> None:
    """All of training, or spec.minWorkers; of preflight one, which checks what the others leave."""
    data = {"train": {"photos": {"annotation": "s3://data/train.jsonl"}}, "preflight": {"workers": 3}}
    run = a_run(scheduling={"gang": "volcano"}, data=data, **({"minWorkers": least} if least else {}))
    assert [gang.pod_groups(run, stage)[0]["spec"]["minMember"] for stage in (TRAIN, PREFLIGHT)] == members


@pytest.mark.parametrize(
    ("scheduling", "where", "key", "scheduler"),
    [
        pytest.param({"gang": "volcano"}, "annotations", "scheduling.k8s.io/group-name", "volcano", id="volcano"),
        pytest.param(
            {"gang": "coscheduling"},
            "labels",
            "scheduling.x-k8s.io/pod-group",
            "scheduler-plugins-scheduler",
            id="coscheduling",
        ),
        pytest.param(
            {"gang": "coscheduling", "schedulerName": "mine"},
            "labels",
            "scheduling.x-k8s.io/pod-group",
            "mine",
            id="coscheduling-under-another-name",
        ),
    ],
)
def test_a_pod_names_its_group_and_its_scheduler(scheduling: Raw, where: str, key: str, scheduler: str) -> None:
    made = pod(scheduling)
    (group,) = gang.pod_groups(a_run(scheduling=scheduling), TRAIN)
    assert made["metadata"][where][key] == group["metadata"]["name"]
    assert made["spec"]["schedulerName"] == scheduler


@pytest.mark.parametrize("stage", [PREFLIGHT, TRAIN], ids=lambda stage: stage.name)
def test_kueue_finds_a_queue_and_a_whole_group(stage: Stage) -> None:
    made = pod({"gang": "kueue", "queue": "team-queue"}, stage, attempt=3)
    labels, annotations = made["metadata"]["labels"], made["metadata"]["annotations"]
    assert labels["kueue.x-k8s.io/queue-name"] == "team-queue"
    assert labels["kueue.x-k8s.io/pod-group-name"] == f"run-{stage.name}-3"
    assert annotations["kueue.x-k8s.io/pod-group-total-count"] == ("2" if stage is TRAIN else "1")
    assert annotations["kueue.x-k8s.io/retriable-in-group"] == "false"
    assert "schedulerName" not in made["spec"]
    assert "schedulingGates" not in made["spec"]  # kueue's webhook adds its own
    assert gang.pod_groups(a_run(scheduling={"gang": "kueue", "queue": "q"}), stage) == []


def test_no_name_of_a_group_is_too_long() -> None:
    long = "a" * 253
    for name in (names.queue_group(long, "baseline-evaluate", 9999), names.pod_group(long, "baseline-evaluate")):
        assert LABEL_VALUE.match(name), name


def test_without_a_gang_pods_are_as_they_were() -> None:
    plain, asked = pods.build(a_run(), TRAIN, 1, 0, CONFIG), pod({})
    assert plain["spec"] == asked["spec"]
    assert "schedulerName" not in plain["spec"]


@pytest.mark.parametrize(
    ("scheduling", "words"),
    [
        pytest.param({"gang": "kueue"}, "spec.scheduling: gang: kueue needs queue", id="kueue-without-a-queue"),
        pytest.param(
            {"gang": "coscheduling", "queue": "q"}, "queue 'q' needs gang: kueue or gang: volcano", id="no-such-queue"
        ),
        pytest.param({"queue": "q"}, "queue 'q' needs gang: kueue or gang: volcano", id="a-queue-of-nobody"),
        pytest.param({"gang": "slurm"}, "spec.scheduling.gang: found 'slurm'", id="unknown-scheduler"),
    ],
)
def test_what_cannot_be_scheduled_so(scheduling: Raw, words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        parse_spec(spec(scheduling=scheduling))


def test_a_scheduler_that_the_operator_was_not_installed_with_is_refused_by_name() -> None:
    world = World(scheduling={"gang": "coscheduling"})
    stalled = world.server.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "GangNotEnabled")
    assert "spec.scheduling.gang: found 'coscheduling'" in stalled["message"]
    assert "gang schedulers volcano (and kueue)" in stalled["message"]
    assert world.server.created == []
    assert gang.not_enabled(a_run(scheduling={"gang": "coscheduling"}).spec.scheduling, OperatorConfig()) is not None


def test_a_crd_that_nobody_installed_is_told_and_the_run_is_not_forgotten() -> None:
    server = Server()
    missing = ApiError(404, "NotFound", "the server could not find the requested resource")
    server.refuse = lambda obj: missing if obj["kind"] == "PodGroup" else None
    server.create(custom_resource(scheduling={"gang": "volcano"}))
    operator = Operator(server)
    operator.run_pass()
    assert server.condition("Stalled")["reason"] == "GangNotEnabled"
    assert "is its CRD installed?" in server.condition("Stalled")["message"]
    server.refuse = lambda obj: None
    operator.settle()
    assert list(names_of(server, "preflight")) == ["run-preflight-0"]


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda server: server.remove(POD_GROUP, "ivft-run-train"), id="deleted"),
        pytest.param(
            lambda server: server.change(POD_GROUP, "ivft-run-train", lambda raw: raw["spec"].update(minMember=1)),
            id="changed",
        ),
    ],
)
def test_a_pod_group_is_made_before_its_pods_mended_and_not_written_again(harm: Callable[[Server], Any]) -> None:
    world = World(scheduling={"gang": "volcano"})
    world.reach("train")
    made = [name for _, name in world.server.created]
    assert made.index("ivft-run-train") < made.index("run-train-0")
    before = len(world.server.writes)
    world.later(60)
    assert world.server.writes[before:] == []
    harm(world.server)
    world.operator.settle()
    assert world.server.objects[POD_GROUP]["ivft-run-train"]["spec"] == {"minMember": 2}
    assert world.status["attempt"] == 1


def test_another_scheduler_restarts_the_stage_and_not_the_run() -> None:
    world = World()
    world.reach("train")
    world.server.edit_spec(scheduling={"gang": "kueue", "queue": "team-queue"})
    world.operator.settle()
    world.collect()
    assert (world.status["stage"], world.server.attempts("train")) == ("train", {"2"})
    labels = world.server.pods["run-train-0"]["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/pod-group-name"] == "run-train-2"
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_a_group_that_kueue_evicts_waits_in_its_queue_again_and_has_lost_nothing() -> None:
    world = World(scheduling={"gang": "kueue", "queue": "q"}, runPolicy={"backoffLimit": 0, "infrastructureLimit": 0})
    world.reach("train")
    for name in world.pods("train"):
        evicted = {"type": "TerminationTarget", "status": "True", "reason": "WorkloadEvictedDueToPreempted"}
        world.server.set_pod(name, {"conditions": [evicted]})
        world.server.change("Pod", name, lambda raw: raw["metadata"].update(deletionTimestamp="2026-01-31T12:02:00Z"))
    world.operator.settle()
    world.collect()
    assert world.server.attempts("train") == {"2"}
    gated = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "gated"}
    for name in world.pods("train"):
        world.server.set_pod(name, {"conditions": [gated]})
    world.operator.settle()
    waiting = world.server.condition("Reconciling")
    assert (world.status["phase"], waiting["reason"]) == ("Pending", "SchedulingGated")
    assert "run-train-0 waits for its queue" in waiting["message"]
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
