"""Whole runs against the simulated cluster: what a user would see from `kubectl get` and `describe`."""

from collections.abc import Callable
from typing import Any

import pytest
from controller.builders import Raw, custom_resource, result, terminated, waiting
from controller.fake_server import Server, clock, names_of
from controller.simulator import STAGES, Operator, World
from internvl_api.constants import KIND
from internvl_api.status import Progress
from internvl_operator.kube.client import ApiError


def test_a_run_goes_through_its_stages_and_is_ready_only_when_published() -> None:
    world = World()
    assert world.pods("preflight") == ["run-preflight-0"]
    assert world.pods("train") == []
    seen = []
    for stage in STAGES:
        seen.append((world.status["stage"], world.status["phase"], world.server.condition("Ready")["status"]))
        world.run(stage)
        seen.append((world.status["stage"], world.status["phase"], world.server.condition("Ready")["status"]))
        world.end(stage, 0, result(stage, artifacts={"adapter": "s3://out/a"} if stage == "publish" else {}))
    assert seen == [
        ("preflight", "Pending", "False"),
        ("preflight", "Running", "False"),
        ("train", "Pending", "False"),
        ("train", "Running", "False"),
        ("publish", "Pending", "False"),
        ("publish", "Running", "False"),
    ]
    assert world.status["phase"] == "Succeeded"
    assert world.server.condition("Ready")["status"] == "True"
    assert world.server.condition("Complete")["status"] == "True"
    assert world.status["artifacts"] == {"adapter": "s3://out/a"}
    assert [entry["state"] for entry in world.status["stages"]] == ["Succeeded"] * 3
    # the logs of every stage can still be read
    assert len(world.server.pods) == 4


def test_a_settled_run_is_not_written_to() -> None:
    world = World()
    world.reach("train")
    before = len(world.server.writes)
    for _ in range(5):
        clock(world.server, 60)
        world.operator.run_pass()
    fresh = Operator(world.server)
    fresh.run_pass()
    assert world.server.writes[before:] == []


def test_a_server_whose_older_crd_drops_a_field_is_not_asked_again_and_again() -> None:
    server = Server()
    keep = server.apply_status
    server.apply_status = lambda obj: keep(  # type: ignore[method-assign]
        obj | {"status": {key: value for key, value in obj["status"].items() if key != "workers"}}
    )
    server.create(custom_resource())
    operator = Operator(server)
    operator.settle()
    written = len(server.writes)
    operator.run_pass()
    assert len(server.writes) == written
    server.set_pod("run-preflight-0", {"phase": "Running"})
    operator.settle()
    assert server.status()["phase"] == "Running"


@pytest.mark.parametrize(
    "lose",
    [
        pytest.param(
            lambda server: server.delete("Pod", "team", "run-train-1", uid=_uid(server), force=False), id="deleted"
        ),
        pytest.param(lambda server: server.remove("Pod", "run-train-1"), id="vanished"),
        pytest.param(
            lambda server: server.set_pod("run-train-1", {"phase": "Failed", "reason": "Evicted", "message": "disk"}),
            id="evicted",
        ),
        pytest.param(
            lambda server: server.set_pod("run-train-1", {"phase": "Failed", **terminated(255, reason="Unknown")}),
            id="node-came-back-without-it",
        ),
    ],
)
def test_a_lost_worker_restarts_the_whole_group_without_touching_the_users_budget(
    lose: Callable[[Server], Any],
) -> None:
    world = World()
    world.reach("train")
    survivor = world.server.pods["run-train-0"]["metadata"]["uid"]
    lose(world.server)
    world.operator.settle()
    assert "deletionTimestamp" in world.server.pods["run-train-0"]["metadata"]  # it may save a checkpoint first
    assert world.server.attempts("train") <= {"1"}
    world.collect()
    assert world.server.attempts("train") == {"2"}
    assert world.server.pods["run-train-0"]["metadata"]["uid"] != survivor
    assert world.status["attempt"] == 2
    assert world.status["restarts"] == {"user": 0, "infrastructure": 1}
    world.run("train")
    assert world.status["phase"] == "Running"


def test_failures_of_the_run_are_retried_with_growing_pauses_and_then_end_it() -> None:
    world = World(runPolicy={"backoffLimit": 2})
    world.pass_stage("preflight")
    for failures, pause in ((1, 0), (2, 10)):
        world.run("train")
        world.end("train", 1, "boom")
        if pause:
            assert world.server.attempts("train") == {str(failures)}  # the failed pods' logs stay while we wait
            world.later(pause - 1)
            assert world.server.attempts("train") == {str(failures)}
            world.later(1)
        assert world.server.attempts("train") == {str(failures + 1)}
        assert world.status["restarts"]["user"] == failures
    world.run("train")
    world.end("train", 1, "boom")
    assert world.status["phase"] == "Failed"
    failed = world.server.condition("Failed")
    assert (failed["status"], failed["reason"]) == ("True", "BackoffLimitExceeded")
    assert "boom" in failed["message"]
    assert "backoffLimit" in failed["message"]
    assert world.server.condition("Stalled")["status"] == "True"


def test_a_failed_run_is_tried_again_when_its_spec_changes() -> None:
    world = World(runPolicy={"backoffLimit": 0})
    world.pass_stage("preflight")
    world.run("train")
    world.end("train", 1, "boom")
    assert world.status["phase"] == "Failed"
    world.server.edit_spec(runPolicy={"backoffLimit": 1})
    world.operator.settle()
    world.collect()
    assert world.status["phase"] == "Pending"
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
    assert world.server.attempts("train") == {"2"}


def test_a_worker_that_hangs_after_its_peer_failed_is_given_some_seconds_then_goes_with_the_group() -> None:
    world = World()
    world.reach("train")
    world.end("train", 1, "boom", ranks=(0,))
    assert world.status["attempt"] == 1
    assert world.operator.requeue == 5
    world.later(5)
    assert world.status["attempt"] == 2
    assert "worker 0" in world.status["stages"][1]["message"]


def test_the_node_that_died_is_blamed_and_not_the_peer_that_failed_because_of_it() -> None:
    world = World()
    world.reach("train")
    world.end("train", 1, "connection reset by peer", ranks=(0,))
    world.server.set_pod("run-train-1", {"phase": "Failed", "reason": "NodeLost", "message": "node gone"})
    world.operator.settle()
    assert world.status["restarts"] == {"user": 0, "infrastructure": 1}


def test_asking_to_be_resumed_costs_nothing_and_starts_again_at_once() -> None:
    world = World()
    world.reach("train")
    for step in (20, 40, 60):
        checkpoint = {"step": step, "uri": f"s3://out/{step}", "sha256": "0", "verifiedAt": "2026-01-31T12:00:00Z"}
        world.end("train", 75, result("train", "resume", "Preempted", checkpoint=checkpoint))
        assert world.status["checkpoint"]["step"] == step
        assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
        assert world.server.attempts("train") == {str(step // 20 + 1)}
        world.run("train")


def test_resuming_without_ever_getting_further_does_not_become_a_hot_loop() -> None:
    world = World()
    world.reach("train")
    world.end("train", 75)
    world.run("train")
    world.end("train", 75)
    assert world.server.attempts("train") == {"2"}
    assert world.status["retryAt"] == "2026-01-31T12:00:10Z"


def test_a_mistake_found_by_preflight_stalls_the_run_and_is_tried_again_later() -> None:
    world = World()
    words = "data.train.photos.annotation: s3://data/train.jsonl:3: found no field conversations"
    for attempt, pause in ((1, 10), (2, 20), (3, 40), (4, 80), (5, 160), (6, 300), (7, 300)):
        world.run("preflight")
        world.end("preflight", 65, result("preflight", "failed", "BrokenRow", message=words))
        stalled = world.server.condition("Stalled")
        assert (stalled["status"], stalled["reason"]) == ("True", "BrokenRow")
        assert words in stalled["message"]
        assert world.status["phase"] == "Stalled"
        assert world.server.condition("Reconciling")["status"] == "False"
        assert world.server.attempts("preflight") == {str(attempt)}
        world.later(pause)
        assert world.server.attempts("preflight") == {str(attempt + 1)}
    world.pass_stage("preflight")  # the file was mended meanwhile
    assert world.status["stage"] == "train"
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
    assert world.server.condition("Stalled")["status"] == "False"


def test_a_stalled_run_is_tried_at_once_when_its_spec_changes() -> None:
    world = World()
    world.run("preflight")
    world.end("preflight", 77, result("preflight", "failed", "AccessDenied", message="secret s3-credentials"))
    assert world.server.attempts("preflight") == {"1"}
    world.server.edit_spec(secrets={"objectStorage": "other"})
    world.operator.settle()
    assert world.server.attempts("preflight") == {"2"}
    env_from = world.server.pods["run-preflight-0"]["spec"]["containers"][0]["envFrom"]
    assert env_from == [{"secretRef": {"name": "other"}}]


@pytest.mark.parametrize(
    "code", [pytest.param(code, id=name) for code, name in ((65, "user-error"), (69, "unavailable"))]
)
def test_training_frees_its_pods_while_it_is_stalled(code: int) -> None:
    world = World()
    world.reach("train")
    world.end("train", code, result("train", "failed", "Named", message="why"), ranks=(1,))
    assert world.server.condition("Stalled")["reason"] == "Named"
    world.collect()
    running = [name for name in world.pods("train") if world.server.pods[name]["status"]["phase"] == "Running"]
    assert running == []


def test_a_missing_secret_is_named_and_the_run_goes_on_when_it_appears() -> None:
    world = World()
    world.server.set_pod("run-preflight-0", waiting("CreateContainerConfigError", 'secret "s3-credentials" not found'))
    world.operator.settle()
    stalled = world.server.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "SecretMissing")
    assert stalled["message"].startswith(
        "spec.secrets.objectStorage: found no Secret 's3-credentials' in namespace 'team'"
    )
    world.server.set_pod("run-preflight-0", {"phase": "Running", "containerStatuses": []})
    world.operator.settle()
    assert world.status["phase"] == "Running"
    assert world.server.attempts("preflight") == {"1"}


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


def test_suspend_frees_every_pod_and_resume_starts_a_new_attempt_that_costs_nothing() -> None:
    world = World()
    world.reach("train")
    world.server.edit_spec(runPolicy={"suspend": True})
    world.operator.settle()
    assert world.server.condition("Suspended")["status"] == "True"
    assert all("deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods("train"))
    world.collect()
    assert world.pods("train") == []
    assert world.status["phase"] == "Suspended"
    assert world.status["workers"] == {"active": 0, "succeeded": 0, "failed": 0}
    world.later(3600)
    assert world.pods("train") == []
    world.server.edit_spec(runPolicy={"suspend": False})
    world.operator.settle()
    assert world.server.attempts("train") == {"2"}
    assert world.status["restarts"] == {"user": 0, "infrastructure": 0}
    assert world.server.condition("Suspended")["status"] == "False"
    assert world.pods("preflight") == ["run-preflight-0"]  # what was done is not done again


def test_a_run_created_suspended_makes_nothing() -> None:
    world = World(runPolicy={"suspend": True})
    assert world.server.created == []
    assert world.status["phase"] == "Suspended"


def test_a_stage_that_ended_well_while_being_suspended_is_not_run_again() -> None:
    world = World()
    world.reach("train")
    for name in world.pods("train"):
        world.server.set_pod(name, {"phase": "Succeeded", **terminated(0)})
    world.server.edit_spec(runPolicy={"suspend": True})
    world.operator.settle()
    assert world.status["phase"] == "Suspended"
    assert world.status["stage"] == "publish"


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


def test_a_change_made_while_suspended_is_not_forgotten() -> None:
    world = World()
    world.reach("train")
    world.server.edit_spec(runPolicy={"suspend": True})
    world.operator.settle()
    world.collect()
    world.server.edit_spec(workers=1)
    world.operator.settle()
    world.server.edit_spec(runPolicy={"suspend": False})
    world.operator.settle()
    assert world.status["stage"] == "preflight"
    digest = world.server.pods["run-preflight-0"]["metadata"]["annotations"]["internvl.dev/run-digest"]
    assert digest == world.status["runDigest"]
    world.pass_stage("preflight")
    assert world.pods("train") == ["run-train-0"]


def test_a_complete_run_stays_complete_whatever_becomes_of_its_spec() -> None:
    world = World()
    for stage in STAGES:
        world.pass_stage(stage)
    world.server.edit_spec(workers=1)
    world.operator.settle()
    assert world.status["phase"] == "Succeeded"
    assert world.status["observedGeneration"] == 2
    assert {condition["observedGeneration"] for condition in world.status["conditions"]} == {2}
    assert len(world.server.pods) == 4


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


def test_a_complete_run_whose_stages_come_back_in_another_order_is_left_at_that() -> None:
    world = World()
    for stage in STAGES:
        world.pass_stage(stage)
    world.server.change(KIND, "run", lambda raw: raw["status"]["stages"].reverse())
    before = len(world.server.writes)
    world.operator.settle()
    assert world.status["stage"] == "publish"
    assert len(world.server.writes) == before


def test_a_run_past_its_deadline_fails_and_frees_its_pods() -> None:
    world = World(runPolicy={"activeDeadlineSeconds": 100})
    world.reach("train")
    world.later(99)
    assert world.status["phase"] == "Running"
    assert world.operator.requeue == 1
    world.later(1)
    assert world.server.condition("Failed")["reason"] == "DeadlineExceeded"
    assert all("deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods("train"))


def test_the_deadline_counts_anew_after_a_suspension() -> None:
    world = World(runPolicy={"activeDeadlineSeconds": 100})
    world.reach("train")
    world.later(60)
    world.server.edit_spec(runPolicy={"activeDeadlineSeconds": 100, "suspend": True})
    world.operator.settle()
    world.collect()
    world.later(1000)
    assert world.status["phase"] == "Suspended"
    world.server.edit_spec(runPolicy={"activeDeadlineSeconds": 100})
    world.operator.settle()
    world.run("train")
    world.later(99)
    assert world.status["phase"] == "Running"
    world.later(1)
    assert world.server.condition("Failed")["reason"] == "DeadlineExceeded"


def test_workers_of_a_new_attempt_read_the_new_configuration() -> None:
    world = World()
    world.reach("train")
    world.server.edit_spec(model={"source": "s3://models/other"})
    world.operator.settle()
    assert "s3://models/tiny" in world.server.objects["ConfigMap"]["ivft-run"]["data"]["run.yaml"]  # they still run
    world.collect()
    assert "s3://models/other" in world.server.objects["ConfigMap"]["ivft-run"]["data"]["run.yaml"]


@pytest.mark.parametrize(("kind", "name"), [("ConfigMap", "ivft-run"), ("Service", "ivft-run")])
def test_what_somebody_deleted_is_made_again(kind: str, name: str) -> None:
    world = World()
    world.reach("train")
    world.server.remove(kind, name)
    world.operator.settle()
    assert name in world.server.objects[kind]
    assert world.status["attempt"] == 1


def test_what_somebody_changed_is_mended() -> None:
    world = World()
    world.reach("train")
    world.server.change("Service", "ivft-run", lambda raw: raw["spec"].update(selector={"app": "other"}))
    world.operator.settle()
    assert world.server.objects["Service"]["ivft-run"]["spec"]["selector"].keys() == {"internvl.dev/job-uid"}


def test_a_finished_run_is_deleted_after_its_time_to_live() -> None:
    world = World(runPolicy={"ttlSecondsAfterFinished": 60})
    for stage in STAGES:
        world.pass_stage(stage)
    assert world.operator.requeue == 60
    clock(world.server, 60)
    world.operator.run_pass()
    assert not any(world.server.objects.values())


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        pytest.param({}, ["run-preflight-0"], id="running-ones-by-default"),
        pytest.param({"cleanPodPolicy": "All"}, [], id="all"),
        pytest.param({"cleanPodPolicy": "None"}, ["run-preflight-0", "run-train-0", "run-train-1"], id="none"),
    ],
)
def test_pods_that_are_left_when_a_run_has_failed(policy: Raw, left: list[str]) -> None:
    world = World(runPolicy={"activeDeadlineSeconds": 100, **policy})
    world.reach("train")
    world.later(100)
    world.collect()
    assert world.status["phase"] == "Failed"
    assert sorted(world.server.pods) == left
    before = len(world.server.writes)
    world.later(60)
    assert world.server.writes[before:] == []


def test_no_pod_is_left_of_a_published_run_that_wants_them_all_gone() -> None:
    world = World(runPolicy={"cleanPodPolicy": "All"})
    for stage in STAGES:
        world.pass_stage(stage)
    assert (world.status["phase"], world.server.pods) == ("Succeeded", {})
    world.later(3600)
    assert (world.status["phase"], world.server.pods) == ("Succeeded", {})


def test_the_progress_column_tells_of_the_stage_that_runs() -> None:
    world = World()
    world.reach("train")
    world.end("train", 0, result("train", progress={"stage": "train", "step": 9, "totalSteps": 9, "loss": 0.5}))
    assert world.status["stage"] == "publish"
    assert "progressText" not in world.status
    world.run("publish")
    uploading = {"stage": "publish", "detail": "uploading"}
    world.server.answers["run-publish-0"] = Progress.model_validate(uploading)
    world.operator.run_pass()
    world.operator.settle()
    assert world.status["progressText"] == "uploading"
    world.end("publish", 0, result("publish", progress=uploading))
    assert world.status["progressText"] == "9/9 loss 0.500"


def test_a_pod_on_a_dead_node_is_deleted_by_force_in_the_end() -> None:
    world = World()
    world.reach("train")
    world.server.delete("Pod", "team", "run-train-1", uid=_uid(world.server), force=False)
    world.operator.settle()
    world.later(120 + 59)  # grace period and almost the bound: its kubelet does not answer
    assert world.server.attempts("train") == {"1"}
    world.later(1)
    assert world.server.attempts("train") == {"2"}


def test_a_run_of_a_name_that_is_still_held_by_an_earlier_run_waits_for_its_pods() -> None:
    world = World()
    world.reach("train")
    old = {name: dict(raw) for name, raw in world.server.pods.items()}
    del world.server.objects[KIND]["run"]  # and the garbage collector has not come yet
    fresh = custom_resource()
    fresh["metadata"]["uid"] = "another"
    world.server.create(fresh)
    world.operator = Operator(world.server)
    world.operator.settle()
    assert set(world.server.pods) == set(old)
    assert world.server.condition("Reconciling")["reason"] == "WaitingForOldPods"
    for kind in ("Pod", "Service", "ConfigMap"):
        for name in list(world.server.objects[kind]):
            world.server.remove(kind, name)
    world.operator.settle()
    assert world.pods("preflight") == ["run-preflight-0"]


def test_the_status_of_an_earlier_run_is_not_the_next_ones_of_that_name() -> None:
    world = World()
    world.reach("train")
    for name in world.pods("train"):
        world.server.set_pod(name, {"phase": "Failed", **terminated(1, finished=world.server.now)})
    world.operator.hear("Pod")  # and not yet that the run is another one
    world.server.remove(KIND, "run")
    fresh = custom_resource()
    fresh["metadata"]["uid"] = "another"
    world.server.create(fresh)
    world.operator.run_pass()
    assert world.server.status() == {}
    world.operator.settle()
    assert (world.status["stage"], world.status["attempt"]) == ("preflight", 1)


def test_what_the_api_server_refuses_is_told_in_its_own_words_and_tried_again() -> None:
    server = Server()
    refusal = ApiError(403, "Forbidden", 'pods "run-preflight-0" is forbidden: exceeded quota: gpus')
    server.refuse = lambda obj: refusal if obj["kind"] == "Pod" else None
    server.create(custom_resource())
    operator = Operator(server)
    for _ in range(3):
        operator.hear()
        operator.run_pass()
    stalled = server.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "QuotaExceeded")
    assert "exceeded quota: gpus" in stalled["message"]
    assert [write for write in server.writes if write[0] == "status"] == [("status", KIND, "run")]
    server.refuse = lambda obj: None
    operator.settle()
    assert server.condition("Stalled")["status"] == "False"
    assert list(names_of(server, "preflight")) == ["run-preflight-0"]


def test_a_deleted_run_is_left_to_the_garbage_collector() -> None:
    world = World()
    world.server.change(KIND, "run", lambda raw: raw["metadata"].update(deletionTimestamp="2026-01-31T12:00:00Z"))
    before = len(world.server.writes)
    world.operator.hear()
    world.operator.run_pass()
    assert world.server.writes[before:] == []


def _uid(server: Server) -> str:
    uid: str = server.pods["run-train-1"]["metadata"]["uid"]
    return uid
