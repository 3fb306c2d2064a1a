"""GPU-hours and cost in status, in the publish pod and in Prometheus."""

import json
from datetime import datetime

import pytest
from controller.builders import NOW, a_run, at, text
from internvl_api.status import AttemptStatus, InternVLFineTuneStatus, StageStatus, Usage
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.resources import pods
from internvl_operator.core.stages import Stage
from internvl_operator.core.usage import Prices, used
from internvl_operator.kubectl_ivft.cost import price
from internvl_operator.metrics import RunCollector
from internvl_operator.settings import Settings, SettingsError

ENDED = AttemptStatus(number=1, gpus=8, started_at=text(at(-7200)), finished_at=text(at(-3600)))
RUNNING = AttemptStatus(number=2, gpus=8, started_at=text(at(-1800)))
STAGES = [StageStatus(name="train", attempts=[ENDED, RUNNING], earlier_gpu_seconds=3600)]


def test_status_counts_the_attempts_that_have_ended() -> None:
    assert used(STAGES, None, "EUR", None) == Usage(gpu_hours=9)
    assert used(STAGES, 2.5, "EUR", None) == Usage(gpu_hours=9, cost=22.5, currency="EUR")
    assert used(STAGES, 2.5, "", NOW) == Usage(gpu_hours=13, cost=32.5)
    assert used([StageStatus(name="publish")], 2.5, "EUR", NOW) is None


@pytest.mark.parametrize("now", [None, NOW])
def test_an_end_that_is_no_time_counts_at_most_until_now(now: datetime | None) -> None:
    malformed = RUNNING.model_copy(update={"finished_at": "yesterday"})
    found = used([StageStatus(name="train", attempts=[ENDED, malformed])], None, "", now)
    assert found == Usage(gpu_hours=12 if now else 8)


def test_the_price_is_that_of_the_runs_gpus() -> None:
    prices = Prices.model_validate({"perGpuHour": {"nvidia.com/gpu": 2.5, "amd.com/gpu": 2}})
    assert prices.of(a_run().spec, "nvidia.com/gpu") == 2.5
    assert prices.of(a_run(podTemplate={"gpuResource": "amd.com/gpu"}).spec, "nvidia.com/gpu") == 2
    assert prices.of(a_run(podTemplate={"gpuResource": "nvidia.com/mig-1g.5gb"}).spec, "nvidia.com/gpu") is None


def test_the_publish_pod_knows_the_usage_for_its_report() -> None:
    pod = pods.build(a_run(), Stage("publish"), 1, 0, OperatorConfig(), usage=Usage(gpu_hours=9, cost=22.5))
    env = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
    assert json.loads(str(env["INTERNVL_USAGE"])) == {"gpuHours": 9.0, "cost": 22.5}


def test_prometheus_and_kubectl_have_the_cost() -> None:
    usage = Usage(gpu_hours=9, cost=22.5, currency="EUR")
    collector = RunCollector(lambda: [("team", "run", InternVLFineTuneStatus(usage=usage))])
    samples = {family.name: family.samples for family in collector.collect()}
    assert [sample.value for sample in samples["internvl_job_gpu_hours"]] == [9]
    assert [(sample.labels["currency"], sample.value) for sample in samples["internvl_job_cost"]] == [("EUR", 22.5)]
    assert price(usage) == 2.5
    assert price(Usage(gpu_hours=9)) is None


@pytest.mark.parametrize(
    "value", ['{"perGpuHour": {"gpu": 1}}', '{"perGpuHour": {"nvidia.com/gpu": -1}}', '{"eur": 1}']
)
def test_prices_are_checked_at_start(value: str) -> None:
    with pytest.raises(SettingsError, match="INTERNVL_OPERATOR_PRICES"):
        Settings.from_env({"INTERNVL_OPERATOR_PRICES": value})
