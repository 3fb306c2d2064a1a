"""Network profiles that cannot work with a run are refused; those of no use to it give a warning."""

import json
from dataclasses import replace
from typing import Any

import pytest
from controller.builders import NOW, Raw, custom_resource
from internvl_api.status import ElasticStatus, InternVLFineTuneStatus
from internvl_api.validation.policy import Policy
from internvl_operator import webhook
from internvl_operator.core.conditions import with_estimates
from internvl_operator.core.group_size import sized
from internvl_operator.core.network_profiles import NetworkProfile
from internvl_operator.core.observe import Observed
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.reconcile import reconcile
from internvl_operator.core.run import Run, read_run

OWN = {
    "megagpu": NetworkProfile(extends="gke-tcpxo"),
    "half": NetworkProfile(extends="gke-tcpxo", gpus_per_worker=4),
    "by-claim": NetworkProfile(resource_claims=({"name": "nics", "resourceClaimTemplateName": "eight-nics"},)),
    "tuned": NetworkProfile(env={"GLOO_SOCKET_IFNAME": "eth1"}),
}
WITH_OWN = OperatorConfig(network_profiles=OWN)
ALLOWED = Policy(network_profiles=("*", "gke-tcpxo"))
ANSWERS = {"tasks": {"coco": {"task": "caption-coco", "annotation": "s3://data/val.json"}}}
ALONE = {"model": {"name": "InternVL2-2B"}, "method": "none", "data": {}, "evaluation": ANSWERS}


def with_profile(profile: str | None, **changes: Any) -> Run:
    network = {"network": {"profile": profile}} if profile else {}
    return read_run(custom_resource(**network, **changes), policy=ALLOWED, profile_gpus=WITH_OWN.profile_gpus)


@pytest.mark.parametrize(
    ("profile", "gpus", "needed"),
    [
        pytest.param("gke-tcpxo", 8, None, id="a whole node"),
        pytest.param("gke-tcpxo", 4, 8, id="half a node"),
        pytest.param("gke-tcpxo", 0, 8, id="on the CPU"),
        pytest.param("megagpu", 4, 8, id="the number is inherited"),
        pytest.param("half", 4, None, id="unless the administrator says another"),
        pytest.param("half", 8, 4, id="which then counts"),
        pytest.param("efa", 4, None, id="most profiles work with any number"),
        pytest.param("none", 4, None, id="the pod network"),
        pytest.param(None, 4, None, id="without a profile"),
    ],
)
def test_a_profile_that_cannot_work_is_refused(profile: str | None, gpus: int, needed: int | None) -> None:
    error = with_profile(profile, gpusPerWorker=gpus).mistake
    if needed is None:
        assert error is None
    else:
        assert error is not None
        assert (error.field, error.reason) == ("spec.gpusPerWorker", "NetworkProfileNotPossible")
        assert error.message.startswith(f"found {gpus}, expected {needed}: network.profile {profile} works with no")


def test_a_run_that_only_evaluates_has_no_network_profile_to_refuse() -> None:
    assert with_profile("gke-tcpxo", gpusPerWorker=1, **ALONE).mistake is None


def test_a_run_that_is_refused_starts_nothing_and_says_why() -> None:
    plan = reconcile(with_profile("gke-tcpxo", gpusPerWorker=4), Observed(), NOW, WITH_OWN)
    stalled = next(each for each in plan.status.conditions if each.type == "Stalled")
    assert (stalled.status, stalled.reason) == ("True", "NetworkProfileNotPossible")
    assert "spec.gpusPerWorker: found 4, expected 8" in stalled.message
    assert plan.apply == ()


def unused(run: Run) -> str | None:
    """The message of the condition NetworkEstimate; None without one."""
    found = [each for each in with_estimates([], run, None, NOW, profiles=OWN) if each.type == "NetworkEstimate"]
    assert all((each.status, each.reason) == ("False", "NetworkUnused") for each in found)
    return found[0].message if found else None


ON_CPU = "spec.gpusPerWorker is 0, and ranks on the CPU exchange over TCP; set it to none"
ONE_WORKER = "spec.workers is 1, and GPUs of one worker exchange inside their node; set it to none"


@pytest.mark.parametrize(
    ("profile", "changes", "words"),
    [
        pytest.param("efa", {"gpusPerWorker": 0}, ("efa, which takes vpc.amazonaws.com/efa: 4 for", ON_CPU), id="cpu"),
        pytest.param(
            "infiniband",
            {"workers": 1, "gpusPerWorker": 8},
            ("rdma/rdma_shared_device_a: 1", ONE_WORKER),
            id="one worker",
        ),
        pytest.param(
            "gke-tcpxo", {"workers": 1, "gpusPerWorker": 8}, ("the sidecar tcpxo-daemon", ONE_WORKER), id="a sidecar"
        ),
        pytest.param("by-claim", {"gpusPerWorker": 0}, ("the resource claim nics", ON_CPU), id="a claim"),
        pytest.param("infiniband", {"gpusPerWorker": 8}, None, id="two nodes with GPUs"),
        pytest.param("host", {"workers": 1, "gpusPerWorker": 8}, None, id="the node's network costs nothing"),
        pytest.param("tuned", {"gpusPerWorker": 0}, None, id="the CPU's own settings"),
        pytest.param("efa", {"gpusPerWorker": 0, **ALONE}, None, id="no worker gets any"),
        pytest.param(None, {"workers": 1}, None, id="without a profile"),
    ],
)
def test_devices_that_training_cannot_use_are_a_warning(
    profile: str | None, changes: Raw, words: tuple[str, ...] | None
) -> None:
    message = unused(with_profile(profile, **changes))
    if words is None:
        assert message is None
    else:
        assert message is not None
        assert all(word in message for word in words), message


def test_a_run_with_one_worker_for_lack_of_room_still_wants_its_network() -> None:
    run = with_profile("efa", workers=2, minWorkers=1, gpusPerWorker=8, training={"globalBatchSize": 16})
    recorded = InternVLFineTuneStatus(
        elastic=ElasticStatus(workers=1, wanted=2, reason="NoRoom", message="no room"), run_digest=run.run_digest
    )
    smaller = sized(replace(run, status=recorded))
    assert smaller.spec.workers == 1
    assert unused(smaller) is None


def asked(known: webhook.Known, **changes: Any) -> Raw:
    request = webhook.Request("7", custom_resource(**changes), None)
    response: Raw = webhook.review(request, known)["response"]
    return response


def test_admission_says_both() -> None:
    known = webhook.Known(ALLOWED, profiles=OWN)
    refused = asked(known, network={"profile": "gke-tcpxo"}, gpusPerWorker=4)
    assert not refused["allowed"]
    assert "spec.gpusPerWorker: found 4, expected 8" in refused["status"]["message"]
    warned = asked(known, network={"profile": "by-claim"}, gpusPerWorker=0)
    assert warned["allowed"]
    assert ["the resource claim nics" in text for text in warned["warnings"]] == [True]
    json.dumps(warned)
