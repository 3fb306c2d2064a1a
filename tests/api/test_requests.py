"""What the pods of a stage need of their node, and what is said of a spec that asks for less."""

from dataclasses import replace
from typing import Any

import pytest
from internvl_api.memory.requests import Needs, needs, size_of_shm
from internvl_api.memory.setup import setup_of
from internvl_api.memory.shortfall import shortfalls
from internvl_api.memory.stop_time import checkpoint_share
from internvl_api.quantity import GIB
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.recipes.summary import recipe_config
from internvl_api.run_config import RunConfig
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import StageName

SPEC: dict[str, Any] = {
    "recipe": "internvl2-26b-full",
    "data": {"meta": "/meta.json"},
    "output": "s3://bucket/run",
    "merge": {"formats": ["hf"]},
}


def resolved(**changes: Any) -> tuple[InternVLFineTuneSpec, RunConfig]:
    spec = parse_spec(SPEC | changes)
    return spec, resolve(spec, job="team/run", job_uid="uid")


def training(name: str, **changes: Any) -> Needs:
    config = recipe_config(name)
    found = needs(config.model_copy(update=changes), "train")
    assert found is not None
    return found


def test_a_worker_has_memory_for_its_share_of_a_checkpoint() -> None:
    """240 GB of 26B on one node, 849 of 76B on four."""
    for name in ("internvl2-26b-full", "internvl2-llama3-76b-full"):
        config, found = recipe_config(name), training(name)
        setup = setup_of(config)
        assert setup is not None
        assert found.memory["snapshot of a checkpoint"] == checkpoint_share(setup, config.workers)
        assert 200 * GIB < found.memory_bytes < 320 * GIB, "a node of eight GPUs has a terabyte"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        pytest.param({"data_workers": 16}, "memory", id="data workers"),
        pytest.param({"data_workers": 16}, "shm", id="batches that they prepare"),
        pytest.param({"micro_batch_size": 8}, "shm", id="larger batches"),
        pytest.param({"max_seq_length": 32768}, "shm", id="longer rows"),
    ],
)
def test_settings_of_the_data_raise_the_need(changes: dict[str, Any], part: str) -> None:
    config = recipe_config("internvl2-8b-lora")
    larger = config.model_copy(update={"training": config.training.model_copy(update=changes)})
    before, after = needs(config, "train"), needs(larger, "train")
    assert before is not None
    assert after is not None
    assert amount(after, part) > amount(before, part)


def amount(found: Needs, part: str) -> int:
    return found.memory_bytes if part == "memory" else found.shm


def test_offload_moves_the_optimizer_to_the_host() -> None:
    config = recipe_config("internvl2-8b-full")
    zero = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    changed = config.training.model_copy(update={"deepspeed": zero})
    setup = setup_of(config)
    assert setup is not None
    offloaded = training("internvl2-8b-full", training=changed).memory["offloaded by ZeRO"]
    assert offloaded == pytest.approx(16 * setup.trainable_parameters)
    assert "offloaded by ZeRO" not in training("internvl2-8b-full").memory


def test_nodes_of_one_gpu_may_have_four_cores() -> None:
    for name in ("internvl2-1b-lora", "internvl2-8b-lora", "internvl2-40b-lora"):
        assert training(name).cores <= 4 * recipe_config(name).world_size


def test_a_model_on_a_volume_is_not_downloaded() -> None:
    config = recipe_config("internvl2-llama3-76b-lora")
    mounted = config.model_copy(update={"model": config.model.model_copy(update={"source": "pvc://models/76b"})})
    remote, local = needs(config, "train"), needs(mounted, "train")
    assert remote is not None
    assert local is not None
    assert remote.disk_bytes - local.disk_bytes == 2 * setup_parameters(config)


def disk(stage: StageName, recipe: str = "internvl2-llama3-76b-full", **changes: Any) -> dict[str, int]:
    """GiB by purpose, rounded."""
    spec = {"recipe": recipe, "data": {"meta": "/meta.json"}, "output": "s3://bucket/run"} | changes
    found = needs(resolve(parse_spec(spec), job="team/run", job_uid="uid"), stage)
    assert found is not None
    return {name: round(amount / GIB) for name, amount in found.disk.items()}


FROZEN = {"training": {"freeze": {"vision": True, "language": True, "projector": False}}}


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        pytest.param("train", {}, {"checkpoint files": 8, "exported shards": 80}, id="ranges of an object store"),
        pytest.param(
            "train",
            {"model": {"name": "InternVL2-Llama3-76B", "source": "https://models.org/76b"}},
            {"weights of the base model": 142, "checkpoint files": 8, "exported shards": 80},
            id="a web server may give no ranges",
        ),
        pytest.param(
            "train",
            FROZEN,
            {"checkpoint files": 1, "exported shards": 80},
            id="a frozen part is exported too",
        ),
        pytest.param(
            "evaluate",
            FROZEN,
            {"trained weights": 142},
            id="full training stored a whole model, so the base is not fetched",
        ),
        pytest.param("evaluate", {"output": "/runs/76b"}, {}, id="a volume is read in place"),
        pytest.param("merge", {}, {"trained weights": 142, "merged model": 142}, id="merge copies what was trained"),
        pytest.param(
            "evaluate",
            {"recipe": "internvl2-llama3-76b-lora"},
            {"weights of the base model": 142, "trained weights": 0},
            id="an adapter on its base",
        ),
    ],
)
def test_the_disk_has_room_for_what_a_stage_fetches_and_writes(
    stage: StageName, changes: dict[str, Any], expected: dict[str, int]
) -> None:
    found = disk(stage, **changes)
    assert found.keys() == expected.keys()
    for name, gib in expected.items():
        assert abs(found[name] - gib) <= 1, found


def setup_parameters(config: RunConfig) -> int:
    setup = setup_of(config)
    assert setup is not None
    return setup.model.parameters


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"model": {"source": "s3://models/tiny"}}, id="a model of the user's"),
        pytest.param({"gpusPerWorker": 0}, id="on the CPU"),
    ],
)
def test_nothing_is_derived_where_nothing_is_known(changes: dict[str, Any]) -> None:
    spec = {key: value for key, value in SPEC.items() if key != "recipe"}
    model: dict[str, Any] = {"model": {"name": "InternVL2-1B"}, "gpusPerWorker": 1}
    config = resolve(parse_spec(spec | model | changes), job="team/run", job_uid="uid")
    assert needs(config, "train") is None
    assert size_of_shm(config) == 8 * GIB


def given(kind: str, **amounts: str) -> dict[str, Any]:
    return {"resources": {kind: {name.replace("_", "-"): value for name, value in amounts.items()}}}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        pytest.param({}, [], id="nothing is given, so it is derived"),
        pytest.param(given("requests", cpu="64", memory="600Gi"), [], id="enough"),
        pytest.param(
            given("requests", cpu="2", memory="600Gi"),
            ["spec.podTemplate.resources.requests.cpu: found 2, train needs about 24 cores"],
            id="two cores for eight GPUs",
        ),
        pytest.param(
            given("limits", memory="64Gi"),
            [
                "spec.podTemplate.resources.limits.memory: found 64Gi, train needs about 286.",
                "launcher 1.0 + 8 processes 20.0 + 32 data workers 22.4 + batches in /dev/shm",
                "snapshot of a checkpoint 223.3",
            ],
            id="memory for half a checkpoint",
        ),
        pytest.param(
            given("limits", ephemeral_storage="20Gi"),
            ["resources.limits.ephemeral-storage: found 20Gi", "weights of the base model 47.5"],
            id="no room for the weights",
        ),
        pytest.param(
            {"shmSize": "64Mi"},
            ["spec.podTemplate.shmSize: found 64Mi, the batches that 32 data workers prepare ahead need up to"],
            id="shm of a container runtime",
        ),
        pytest.param(
            {"stageResources": {"merge": {"limits": {"memory": "1Gi"}}}},
            ["spec.podTemplate.stageResources.merge.limits.memory: found 1Gi, merge needs about"],
            id="a merge in too little",
        ),
        pytest.param(
            {"terminationGracePeriodSeconds": 120},
            [
                "spec.podTemplate.terminationGracePeriodSeconds: found 120, a stop that saves a checkpoint takes about",
                "240 GB of a checkpoint at 1 GB/s = 240 s + 30 s; remove the field, or raise it",
            ],
            id="a stop that is killed",
        ),
        pytest.param({"terminationGracePeriodSeconds": 330}, [], id="a stop that has time"),
        pytest.param(
            {"resources": {"limits": {"memory": "500Gi"}, "requests": {"memory": "1Gi"}}},
            ["spec.podTemplate.resources.requests.memory: found 1Gi, train needs about 286."],
            id="a limit that suffices with a request that does not",
        ),
    ],
)
def test_what_is_said_of_too_little(template: dict[str, Any], said: list[str]) -> None:
    found = shortfalls(*resolved(podTemplate=template))
    assert len(found) == bool(said)
    assert all(words in found[0] for words in said), found


def test_an_amount_a_little_below_the_estimate_is_not_worth_a_warning() -> None:
    needed = training("internvl2-26b-full").memory_bytes
    template = given("requests", memory=f"{int(0.93 * needed)}")
    assert shortfalls(*resolved(podTemplate=template)) == []


def test_more_workers_share_a_checkpoint() -> None:
    config = recipe_config("internvl2-26b-full")
    setup = setup_of(config)
    assert setup is not None
    assert checkpoint_share(replace(setup), 4) * 4 == pytest.approx(checkpoint_share(setup, 1), rel=1e-6)


@pytest.mark.parametrize("given", [None, 3600])
def test_a_stop_that_no_grace_period_allows(given: int | None) -> None:
    template = {} if given is None else {"terminationGracePeriodSeconds": given}
    (said,) = shortfalls(*resolved(podTemplate=template), storage_rate=50e6)
    assert "the longest grace period is 3600 s" in said
    assert "240 GB of a checkpoint at the measured 0.05 GB/s" in said
    assert "use more workers or faster storage for spec.output" in said


def test_the_fewest_workers_of_an_elastic_run_decide() -> None:
    changes = {"recipe": "internvl2-llama3-76b-full", "podTemplate": given("requests", memory="280Gi")}
    assert shortfalls(*resolved(**changes)) == []
    (said,) = shortfalls(*resolved(**changes, minWorkers=2))
    assert "requests.memory: found 280Gi, train needs about" in said
    assert said.endswith("(at the fewest workers, spec.minWorkers 2)")
