"""What a run measures decides the next grace period and the warnings; what a pod makes up decides nothing."""

import json
from typing import Any

import pytest
from controller.builders import CONFIG, NOW, Raw, a_run, custom_resource, result
from controller.simulator import World
from internvl_api.status import Bandwidth, InternVLFineTuneStatus, Progress
from internvl_operator.core.conditions import with_estimates
from internvl_operator.core.measured_storage import with_measured_grace
from internvl_operator.core.observe import Observed
from internvl_operator.core.policies import oom_policy
from internvl_operator.core.reconcile import reconcile
from internvl_operator.core.resources import pods
from internvl_operator.core.run import Run, read_run
from internvl_operator.core.stages import Stage
from internvl_operator.core.telemetry import read_answer, read_result

BIG: Raw = {"recipe": "internvl2-llama3-76b-full", "model": {"name": "InternVL2-Llama3-76B"}}
BIG |= {"workers": 4, "gpusPerWorker": 8}
TRAIN = Stage("train")


@pytest.mark.parametrize(
    "rate",
    [
        pytest.param("-1", id="negative"),
        pytest.param("0", id="zero"),
        pytest.param("NaN", id="nan"),
        pytest.param("1e300", id="huge"),
        pytest.param("1e999", id="infinite"),
        pytest.param("1e-300", id="tiny"),
        pytest.param("9" * 400, id="400-digits"),
        pytest.param('"1e9"', id="text"),
        pytest.param("true", id="bool"),
        pytest.param("null", id="null"),
        pytest.param("[1e9]", id="list"),
        pytest.param('{"a": 1}', id="object"),
    ],
)
def test_what_is_no_rate_is_left_out_and_the_rest_counts(rate: str) -> None:
    bandwidth = f'{{"storageWrite": {rate}, "allReduce": 2e9, "more": 1}}'
    found = read_answer(f'{{"step": 3, "bandwidth": {bandwidth}}}'.encode())
    assert found is not None
    assert found.progress.to_dict() == {"step": 3, "bandwidth": {"allReduce": 2e9}}
    said = json.dumps(result("train", progress={"step": 3})).replace('"step"', f'"bandwidth": {bandwidth}, "step"')
    last = read_result(said)
    assert last is not None
    assert last.progress is not None
    assert last.progress.bandwidth == Bandwidth(all_reduce=2e9)


@pytest.mark.parametrize("bandwidth", ["7", '"fast"', "[]", "null", "{" + '"a":' * 3 + "1" + "}"])
def test_what_is_no_map_of_rates_is_no_measurement(bandwidth: str) -> None:
    found = read_answer(f'{{"step": 3, "bandwidth": {bandwidth}}}'.encode())
    assert found is None or not (found.progress.bandwidth or Bandwidth()).to_dict()


def measured(bandwidth: Raw | None, *, same_spec: bool = True, **changes: Any) -> Run:
    """A run whose status has this bandwidth, of this spec or of another one."""
    digest = read_run(custom_resource(**BIG | changes)).run_digest
    status = {"runDigest": digest if same_spec else "another", "progress": {"bandwidth": bandwidth or {}}}
    return with_measured_grace(read_run(custom_resource(status=status, **BIG | changes)))


def grace(run: Run) -> int:
    """Of the pods of training; run.yaml has the same."""
    pod = pods.build(run, TRAIN, 2, 0, CONFIG)
    seconds: int = pod["spec"]["terminationGracePeriodSeconds"]
    assert f"graceSeconds: {seconds}\n" in oom_policy.run_yaml(run, run.status)
    return seconds


@pytest.mark.parametrize(
    ("rate", "seconds"),
    [
        pytest.param(None, 286, id="nothing is measured: 1 GB/s"),
        pytest.param(0.25e9, 922, id="slow storage needs longer"),
        pytest.param(8e9, 286, id="fast storage does not shorten the grace period"),
        pytest.param(1.0, 3600, id="never longer than an hour"),
    ],
)
def test_the_next_attempts_grace_period_follows_the_storage(rate: float | None, seconds: int) -> None:
    assert grace(measured({"storageWrite": rate} if rate else None)) == seconds


def test_the_users_grace_period_stays_and_another_specs_measurement_does_not_count() -> None:
    template = {"terminationGracePeriodSeconds": 400}
    assert grace(measured({"storageWrite": 0.25e9}, podTemplate=template)) == 400
    assert grace(measured({"storageWrite": 0.25e9}, same_spec=False)) == 286


@pytest.mark.parametrize(
    ("rate", "warned"),
    [
        pytest.param(None, "at 1 GB/s = 212 s", id="assumed"),
        pytest.param(0.25e9, "at the measured 0.25 GB/s = 849 s", id="measured, and slower"),
        pytest.param(4e9, None, id="measured, and fast enough"),
    ],
)
def test_a_smaller_grace_period_is_judged_by_the_measured_rate(rate: float | None, warned: str | None) -> None:
    run = a_run(**BIG, podTemplate={"terminationGracePeriodSeconds": 200})
    status = InternVLFineTuneStatus(progress=Progress(bandwidth=Bandwidth(storage_write=rate)))
    messages = [each.message for each in with_estimates([], run, None, NOW, status) if each.type == "ResourceEstimate"]
    assert [warned in message for message in messages] == [True] * (warned is not None) if warned else messages == []


@pytest.mark.parametrize(
    ("changes", "rate", "bound"),
    [
        pytest.param({}, 10e9, True, id="one card of 100 Gbit/s"),
        pytest.param({}, 160e9, False, id="eight of 200"),
        pytest.param({}, None, False, id="nothing measured"),
        pytest.param({"workers": 1}, 1e9, False, id="one node sends nothing"),
        pytest.param({"gpusPerWorker": 0}, 1e9, False, id="on the CPU"),
    ],
)
def test_a_network_that_decides_is_a_condition(changes: Raw, rate: float | None, bound: bool) -> None:
    run = a_run(**BIG | changes)
    status = InternVLFineTuneStatus(progress=Progress(bandwidth=Bandwidth(all_reduce=rate)))
    found = [each for each in with_estimates([], run, None, NOW, status) if each.type == "NetworkEstimate"]
    assert bool(found) == bound
    if bound:
        assert (found[0].status, found[0].reason) == ("False", "NetworkBound")
        assert "each node sends 1340 GB, which takes 134 s at the measured 10 GB/s" in found[0].message


def test_it_is_one_event_and_goes_with_a_faster_network() -> None:
    status: Raw = {"progress": {"bandwidth": {"allReduce": 10e9}}}
    digest = read_run(custom_resource(**BIG)).run_digest
    first = reconcile(read_run(custom_resource(status=status | {"runDigest": digest}, **BIG)), Observed(), NOW, CONFIG)
    assert [event.reason for event in first.events].count("NetworkBound") == 1
    recorded = first.status.to_dict()
    again = reconcile(read_run(custom_resource(status=recorded, **BIG)), Observed(), NOW, CONFIG)
    assert "NetworkBound" not in [event.reason for event in again.events]
    recorded |= {"progress": {"bandwidth": {"allReduce": 160e9}}}
    fast = reconcile(read_run(custom_resource(status=recorded, **BIG)), Observed(), NOW, CONFIG)
    assert "NetworkEstimate" not in {condition.type for condition in fast.status.conditions}


def test_a_run_keeps_its_rates_and_ignores_small_changes() -> None:
    world = World()
    world.reach("train")

    def told(bandwidth: Bandwidth | None) -> Raw:
        world.server.answers["run-train-0"] = Progress(stage="train", step=1, bandwidth=bandwidth)
        world.later(10)
        found: Raw = world.status["progress"].get("bandwidth", {})
        return found

    assert told(None) == {}
    assert told(Bandwidth(storage_write=1e9)) == {"storageWrite": 1e9}
    assert told(Bandwidth(storage_write=1.1e9)) == {"storageWrite": 1e9}, "within a fifth"
    assert told(Bandwidth()) == told(None) == {"storageWrite": 1e9}
    assert told(Bandwidth(storage_write=2e9)) == {"storageWrite": 2e9}
    world.end("train", 75, result("train", "resume", "Preempted"))
    assert world.status["progress"]["bandwidth"] == {"storageWrite": 2e9}, "the next attempt needs it"
