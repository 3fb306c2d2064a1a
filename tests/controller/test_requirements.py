"""Requests of the pods of a run: the spec's, else the administrator's, else what the model needs."""

import json
from dataclasses import replace
from typing import Any, get_args

import pytest
from controller.builders import CONFIG, NOW, Raw, a_run, custom_resource
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import StageName
from internvl_operator.core.conditions import with_estimates
from internvl_operator.core.observe import Observed
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.reconcile import reconcile
from internvl_operator.core.resources import pods, requirements
from internvl_operator.core.run import read_run
from internvl_operator.core.stages import Stage
from internvl_operator.webhook import Known, Request, answer, review

TRAIN, MERGE, PREFLIGHT = Stage("train"), Stage("merge"), Stage("preflight")
BIG: Raw = {"model": {"name": "InternVL2-26B"}, "workers": 1, "gpusPerWorker": 8, "training": {"zeroStage": 3}}
TINY: Raw = {"model": {"source": "s3://models/tiny"}, "workers": 1, "gpusPerWorker": 2}
DERIVED = {"cpu": "24", "memory": "287Gi", "ephemeral-storage": "104Gi"}
DEFAULT = {"cpu": "1", "memory": "2Gi"}
OWN = {"requests": {"cpu": "3", "memory": "5Gi"}}
OF_A_CLAIM: Raw = {"persistentVolumeClaim": {"claimName": "large"}}


def mounted(path: str, volume: Raw) -> Raw:
    """A podTemplate with a volume of the run at a path."""
    return {"volumes": [{"name": "large", **volume}], "volumeMounts": [{"name": "large", "mountPath": path}]}


@pytest.mark.parametrize(
    ("changes", "config", "requests"),
    [
        pytest.param(BIG, CONFIG, DERIVED, id="derived from the model"),
        pytest.param(TINY, CONFIG, DEFAULT, id="a model of the user's has the defaults"),
        pytest.param(BIG | {"gpusPerWorker": 0}, CONFIG, DEFAULT, id="a run on the CPU gets the default"),
        pytest.param(BIG, OperatorConfig(worker_resources=OWN), OWN["requests"], id="the administrator's setting"),
        pytest.param(
            BIG | {"podTemplate": {"resources": OWN}}, OperatorConfig(worker_resources={}), OWN["requests"], id="spec"
        ),
        pytest.param(
            BIG,
            OperatorConfig(cache_host_path="/mnt/cache"),
            {"cpu": "24", "memory": "287Gi", "ephemeral-storage": "56Gi"},
            id="weights on a disk of the node are not of the pod, its checkpoint and export are",
        ),
        pytest.param(
            BIG | {"podTemplate": mounted("/cache", OF_A_CLAIM)},
            CONFIG,
            {"cpu": "24", "memory": "287Gi", "ephemeral-storage": "56Gi"},
            id="nor are those on a volume of the run",
        ),
        pytest.param(
            BIG | {"podTemplate": mounted("/scratch", OF_A_CLAIM)},
            CONFIG,
            {"cpu": "24", "memory": "287Gi", "ephemeral-storage": "48Gi"},
            id="its checkpoint and export may be on one too",
        ),
        pytest.param(
            BIG | {"podTemplate": mounted("/cache", {"emptyDir": {"medium": "Memory", "sizeLimit": "60Gi"}})},
            CONFIG,
            {"cpu": "24", "memory": "347Gi", "ephemeral-storage": "56Gi"},
            id="a volume in memory is memory",
        ),
        pytest.param(
            BIG | {"podTemplate": mounted("/cache", {"emptyDir": {}})},
            OperatorConfig(cache_host_path="/mnt/cache"),
            DERIVED,
            id="an emptyDir of the run is the pod's disk, wherever the administrator has the cache",
        ),
    ],
)
def test_requests_of_a_worker(changes: Raw, config: OperatorConfig, requests: dict[str, str]) -> None:
    found = requirements.build(a_run(**changes), TRAIN, config)
    assert found["requests"] == requests
    assert "memory" not in found.get("limits", {}), "an estimate ends no pod"


@pytest.mark.parametrize(
    ("stage", "requests"),
    [
        pytest.param(PREFLIGHT, {"cpu": "2", "memory": "4Gi"}, id="preflight"),
        pytest.param(MERGE, {"cpu": "2", "memory": "7Gi", "ephemeral-storage": "96Gi"}, id="merge"),
    ],
)
def test_requests_of_a_stage_on_the_cpu(stage: Stage, requests: dict[str, str]) -> None:
    assert requirements.build(a_run(**BIG), stage, CONFIG) == {"requests": requests}
    assert requirements.build(a_run(**TINY), stage, CONFIG)["requests"] == {"cpu": "100m", "memory": "512Mi"}


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        pytest.param(BIG, "8Gi", id="enough for short rows"),
        pytest.param(
            BIG | {"training": {"microBatchSize": 2, "maxSeqLength": 16384, "zeroStage": 3}}, "11Gi", id="long rows"
        ),
        pytest.param(BIG | {"podTemplate": {"shmSize": "1Gi"}}, "1Gi", id="the spec's"),
        pytest.param(TINY, "8Gi", id="nothing is known"),
    ],
)
def test_shm_has_room_for_the_batches_in_flight(changes: Raw, size: str) -> None:
    pod = pods.build(a_run(**changes), TRAIN, 1, 0, CONFIG)
    (shm,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"]["sizeLimit"] == size


TOO_SMALL = BIG | {"podTemplate": {"resources": {"limits": {"memory": "64Gi"}}, "shmSize": "64Mi"}}


def test_too_little_is_a_condition_and_one_event() -> None:
    first = reconcile(read_run(custom_resource(**TOO_SMALL)), Observed(), NOW, CONFIG)
    condition = next(each for each in first.status.conditions if each.type == "ResourceEstimate")
    assert (condition.status, condition.reason) == ("False", "ResourcesDoNotFit")
    assert "found 64Gi, train needs about 28" in condition.message
    assert "shmSize: found 64Mi" in condition.message
    assert [event.reason for event in first.events].count("ResourcesDoNotFit") == 1
    again = reconcile(read_run(custom_resource(status=first.status.to_dict(), **TOO_SMALL)), Observed(), NOW, CONFIG)
    assert "ResourcesDoNotFit" not in [event.reason for event in again.events]


def test_the_condition_goes_when_the_spec_is_corrected() -> None:
    bad = with_estimates([], a_run(**TOO_SMALL), None, NOW)
    assert [condition.type for condition in bad] == ["ResourceEstimate"]
    assert with_estimates(bad, a_run(**BIG), None, NOW) == []


@pytest.mark.parametrize(
    ("changes", "warned"), [pytest.param(TOO_SMALL, True, id="too little"), pytest.param(BIG, False, id="derived")]
)
def test_kubectl_shows_a_warning_at_admission(changes: Raw, warned: bool) -> None:
    asked: dict[str, Any] = {"uid": "1", "object": custom_resource(**changes)}
    status, text = answer(json.dumps({"apiVersion": "admission.k8s.io/v1", "request": asked}).encode())
    response = json.loads(text)["response"]
    assert (status, response["allowed"]) == (200, True)
    assert ("warnings" in response) == warned


def test_settings_of_the_operator_that_are_too_small_for_a_run_are_said_too() -> None:
    small = OperatorConfig(worker_resources={"limits": {"memory": "64Gi"}})
    plan = reconcile(a_run(**BIG), Observed(), NOW, small)
    condition = next(each for each in plan.status.conditions if each.type == "ResourceEstimate")
    assert "the operator's setting workerResources.limits.memory: found 64Gi, train needs about" in condition.message
    request = Request("1", custom_resource(**BIG), None)
    warnings = review(request, Known(settings=small.pod_settings))["response"]["warnings"]
    assert "; ".join(warnings) == condition.message


def test_a_new_derivation_recreates_unstarted_pods_alone() -> None:
    before = pods.defaults_digest(a_run(**TINY), TRAIN, CONFIG)
    assert pods.defaults_digest(a_run(**BIG), TRAIN, CONFIG) != before
    assert pods.defaults_digest(a_run(**TINY), TRAIN, replace(CONFIG, retry_base=1.0)) == before


@pytest.mark.parametrize(
    ("changes", "stage", "seconds"),
    [
        pytest.param(BIG, TRAIN, 282, id="a step and the share of a checkpoint"),
        pytest.param(
            BIG | {"workers": 2, "training": {"zeroStage": 3, "globalBatchSize": 16}}, TRAIN, 156, id="half each"
        ),
        pytest.param(BIG | {"podTemplate": {"terminationGracePeriodSeconds": 900}}, TRAIN, 900, id="the spec's"),
        pytest.param(BIG, MERGE, 120, id="a stage without checkpoints"),
        pytest.param(TINY, TRAIN, 120, id="nothing is known"),
    ],
)
def test_grace_period_of_a_worker(changes: Raw, stage: Stage, seconds: int) -> None:
    run = a_run(**changes)
    pod = pods.build(run, stage, 1, 0, CONFIG)
    assert pod["spec"]["terminationGracePeriodSeconds"] == seconds
    if stage.name == "train":
        assert run.resolved.run_config is not None
        assert run.resolved.run_config.grace_seconds == seconds, "the trainer knows what it has"


@pytest.mark.parametrize("stage", get_args(StageName))
def test_the_field_that_messages_name_exists(stage: str) -> None:
    section: Any = InternVLFineTuneSpec
    for name in requirements.setting(stage).removeprefix("spec.").split("."):
        fields = {field.alias: field for field in section.model_fields.values()}
        section = fields[name].annotation


@pytest.mark.parametrize(
    ("changes", "config", "gib"),
    [
        pytest.param({}, CONFIG, None, id="no limit: the trainer's default"),
        pytest.param({"ephemeral-storage": "900Gi"}, CONFIG, None, id="a limit with room for the default"),
        pytest.param({"ephemeral-storage": "200Gi"}, CONFIG, 87, id="nine tenths of what training leaves"),
        pytest.param({"ephemeral-storage": "60Gi"}, CONFIG, 0.1, id="never nothing"),
        pytest.param(
            {"ephemeral-storage": "200Gi"}, OperatorConfig(cache_host_path="/mnt"), None, id="the node's own folder"
        ),
        pytest.param({}, OperatorConfig(scratch_size_limit="100Gi"), 47, id="a small volume, with the model in it"),
    ],
)
def test_the_cache_stays_within_the_disks_limit(changes: Raw, config: OperatorConfig, gib: float | None) -> None:
    run = a_run(**BIG, podTemplate={"resources": {"limits": changes}})
    assert requirements.cache_gib(run, TRAIN, config) == gib


@pytest.mark.parametrize(
    ("volume", "gib"),
    [
        pytest.param(OF_A_CLAIM, None, id="a claim: its size is not known"),
        pytest.param({"emptyDir": {"sizeLimit": "100Gi"}}, 47, id="nine tenths of what the model leaves"),
        pytest.param({"emptyDir": {"sizeLimit": "60Gi", "medium": "Memory"}}, 11, id="of memory"),
        pytest.param({"emptyDir": {"sizeLimit": "0"}}, 87, id="zero is no limit"),
        pytest.param(
            {"ephemeral": {"volumeClaimTemplate": {"spec": {"resources": {"requests": {"storage": "70Gi"}}}}}},
            20,
            id="a claim of the pod: what it asks for",
        ),
        pytest.param({"emptyDir": {"sizeLimit": "900Gi"}}, 87, id="the limit of the container is smaller"),
    ],
)
def test_the_cache_stays_within_a_volume_of_the_run(volume: Raw, gib: float | None) -> None:
    limits = {"resources": {"limits": {"ephemeral-storage": "200Gi"}}}
    run = a_run(**BIG, podTemplate=mounted("/cache", volume) | limits)
    assert requirements.cache_gib(run, TRAIN, CONFIG) == gib


def test_a_volume_for_both_has_room_for_both() -> None:
    volume = mounted("/cache", {"emptyDir": {"sizeLimit": "200Gi"}})
    volume["volumeMounts"] = [
        {"name": "large", "mountPath": path, "subPath": path.strip("/")} for path in ("/cache", "/scratch")
    ]
    assert requirements.cache_gib(a_run(**BIG, podTemplate=volume), TRAIN, CONFIG) == 87


def test_a_cache_below_a_gib_is_a_part_of_one() -> None:
    run = a_run(**TINY, podTemplate=mounted("/cache", {"emptyDir": {"sizeLimit": "500Mi"}}))
    assert requirements.cache_gib(run, TRAIN, CONFIG) == 0.24


def test_uploading_takes_the_disk_of_the_files_in_transit() -> None:
    changes = BIG | {"publish": {"hub": {"repository": "team/model"}}, "secrets": {"huggingFace": "hub"}}
    found = requirements.build(a_run(**changes), Stage("publish"), CONFIG)
    assert found["requests"]["ephemeral-storage"] == "10Gi"
    assert "ephemeral-storage" not in requirements.build(a_run(**BIG), Stage("publish"), CONFIG)["requests"]


def test_the_cache_of_an_unknown_model_has_half_of_the_disks_limit() -> None:
    run = a_run(**TINY, podTemplate={"resources": {"limits": {"ephemeral-storage": "50Gi"}}})
    assert requirements.cache_gib(run, TRAIN, CONFIG) == 25
    assert requirements.cache_gib(a_run(**TINY), TRAIN, OperatorConfig(scratch_size_limit="50Gi")) == 25
