"""Changes of the spec while a run waits, trains or is done."""

import pytest
from controller.builders import Raw, custom_resource
from controller.simulator import STAGES, World
from internvl_api.constants import KIND


def test_a_wrong_spec_makes_no_child_and_names_the_field() -> None:
    world = World(training={"globalBatchSize": 7})
    stalled = world.server.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "BatchNotDivisible")
    assert stalled["message"].startswith("spec.training.globalBatchSize: 7 is not a multiple of")
    assert world.server.created == []
    world.server.edit_spec(training={"globalBatchSize": 8})
    world.operator.settle()
    assert world.pods("preflight") == ["run-preflight-0"]


def test_a_spec_that_becomes_wrong_leaves_the_running_pods_alone_until_it_is_mended() -> None:
    world = World(training={"globalBatchSize": 8})
    world.reach("train")
    before = {name: raw["metadata"]["uid"] for name, raw in world.server.pods.items()}
    world.server.edit_spec(training={"globalBatchSize": 7})
    world.operator.settle()
    assert world.server.condition("Stalled")["reason"] == "BatchNotDivisible"
    world.server.edit_spec(training={"globalBatchSize": 8})
    world.operator.settle()
    assert world.status["phase"] == "Running"
    assert {name: raw["metadata"]["uid"] for name, raw in world.server.pods.items()} == before


@pytest.mark.parametrize(
    ("change", "stage", "attempt"),
    [
        pytest.param({"runPolicy": {"backoffLimit": 7}}, "train", "1", id="run-policy-restarts-nothing"),
        pytest.param({"podTemplate": {"nodeSelector": {"a": "b"}}}, "train", "2", id="pod-template-restarts-the-stage"),
        pytest.param({"secrets": {"objectStorage": "new"}}, "train", "2", id="secrets-restart-the-stage"),
        pytest.param({"workers": 4}, "preflight", "2", id="anything-else-starts-the-stages-again"),
    ],
)
def test_a_spec_change_while_training_restarts_what_it_must(change: Raw, stage: str, attempt: str) -> None:
    world = World()
    world.reach("train")
    world.server.edit_spec(**change)
    world.operator.settle()
    world.collect()
    assert world.status["stage"] == stage
    assert world.server.attempts(stage) == {attempt}
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
    assert world.status["observedGeneration"] == 2


def test_workers_of_a_new_attempt_read_the_new_configuration() -> None:
    world = World()
    world.reach("train")
    world.server.edit_spec(model={"source": "s3://models/other"})
    world.operator.settle()
    assert "s3://models/tiny" in world.server.objects["ConfigMap"]["ivft-run"]["data"]["run.yaml"]  # they still run
    world.collect()
    assert "s3://models/other" in world.server.objects["ConfigMap"]["ivft-run"]["data"]["run.yaml"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param({"workers": 1}, True, id="what decides the result"),
        pytest.param({"runPolicy": {"ttlSecondsAfterFinished": 10**6}}, False, id="runPolicy"),
        pytest.param({"podTemplate": {"image": "newer"}}, False, id="podTemplate"),
        pytest.param({"model": {"name": "no such model"}}, True, id="a mistake"),
    ],
)
def test_a_change_that_comes_too_late_is_told_until_it_is_taken_back(change: Raw, told: bool) -> None:
    world = World()
    for stage in STAGES:
        world.pass_stage(stage)
    before = world.server.condition("Ready")
    world.server.edit_spec(**change)
    world.operator.settle()
    now = world.server.condition("Ready")
    assert (now["message"] != before["message"]) == told
    assert ("the spec changed after publishing and has no effect" in now["message"]) == told
    assert (now["status"], now["lastTransitionTime"]) == ("True", before["lastTransitionTime"])
    writes = len(world.server.writes)
    world.operator.settle()
    assert len(world.server.writes) == writes
    world.server.change(KIND, "run", lambda raw: raw.update(spec=custom_resource()["spec"]))
    world.operator.settle()
    assert world.server.condition("Ready")["message"] == before["message"]


@pytest.mark.parametrize("change", [{"output": "s3://out/other"}, {"workers": 1}, {"evaluation": {"batchSize": 0}}])
def test_a_change_that_comes_too_late_sends_one_event(change: Raw) -> None:
    world = World()
    for stage in STAGES:
        world.pass_stage(stage)
    world.server.edit_spec(**change)
    world.operator.settle()
    world.server.edit_spec(gpusPerWorker=1)
    world.operator.settle()
    told = [message for kind, reason, message in world.server.events if reason == "SpecChangeIgnored"]
    assert len(told) == 1
    assert "the run is complete" in told[0]
    assert "create a new InternVLFineTune with another name and another spec.output" in told[0]


def test_the_note_of_an_earlier_operator_is_replaced() -> None:
    world = World()
    for stage in STAGES:
        world.pass_stage(stage)
    world.server.edit_spec(workers=1)

    def note_of_old(raw: Raw) -> None:
        (ready,) = [each for each in raw["status"]["conditions"] if each["type"] == "Ready"]
        ready["message"] += "; the spec changed after publishing and has no effect: in other words"

    world.server.change(KIND, "run", note_of_old)
    world.operator.settle()
    assert world.server.condition("Ready")["message"].count("the spec changed after publishing") == 1
