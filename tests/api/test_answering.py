"""The GPUs of one copy of a model that answers, and runs that are refused because none can hold it."""

from typing import Any

import pytest
from internvl_api.memory.answering import Answering, answering_of, gpus_of_a_copy
from internvl_api.quantity import parse_bytes
from internvl_api.recipes.resolve import parse_spec
from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster

TASKS = {"docs": {"task": "vqa", "annotation": "s3://bucket/docs.jsonl"}}


def run(recipe: str, gpus: int = 8, **changes: Any) -> dict[str, Any]:
    train = {"own": {"annotation": "s3://bucket/own.jsonl"}}
    given = {"recipe": recipe, "data": {"train": train}, "output": "s3://bucket/out", "evaluation": {"tasks": TASKS}}
    return {**given, "gpusPerWorker": gpus, **changes}


@pytest.mark.parametrize(
    ("recipe", "gpus", "memory", "copy"),
    [
        ("internvl2-2b-full", 8, "80GB", 1),
        ("internvl2-26b-full", 8, "80GB", 1),
        ("internvl2-26b-full", 8, "24GB", 8),
        ("internvl2-40b-full", 8, "80GB", 2),
        ("internvl2-llama3-76b-full", 8, "80GB", 4),
        ("internvl2-llama3-76b-lora", 2, "141GB", 2),
        ("internvl2-5-78b-full", 8, "80GB", 4),
        ("internvl2-llama3-76b-full", 8, "24GB", None),
        ("internvl2-llama3-76b-full", 2, "80GB", None),
        ("internvl2-5-1b-full", 8, "1GB", None),  # 14 heads, which no divisor of 8 but 2 divides
    ],
)
def test_the_gpus_of_a_copy(recipe: str, gpus: int, memory: str, copy: int | None) -> None:
    model = answering_of(parse_spec(run(recipe, gpus)))
    assert model is not None
    assert gpus_of_a_copy(model, gpus, parse_bytes(memory)) == copy


@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "possible"),
    [(64, 8, 28672, [1, 2, 4, 8, 16]), (16, 2, 64, [1, 2, 4, 8, 16]), (28, 4, 18944, [1, 2, 4]), (12, 3, 64, [1])],
)
def test_heads_and_channels_are_shared_evenly(heads: int, kv_heads: int, channels: int, possible: list[int]) -> None:
    model = Answering(0, 0, heads, kv_heads, channels)
    assert [k for k in (1, 2, 4, 8, 16) if model.can_split(k)] == possible


def test_a_run_whose_result_no_worker_can_hold_is_refused_before_it_trains() -> None:
    spec = run("internvl2-llama3-76b-full", 2, workers=16)
    assert check_spec(spec, InCluster()).violations == ()
    assert check_spec(spec, InCluster(gpu_memory=parse_bytes("141GB"))).violations == ()
    (violation,) = check_spec(spec, InCluster(gpu_memory=parse_bytes("80GB"))).violations
    assert (violation.field, violation.reason) == ("spec.evaluation.tasks", "EvaluationNotPossible")
    assert violation.message == (
        "a copy of the model that answers needs 78.3 GiB of weights on each of 2 GPUs, found room for 59.6 GiB (80% of "
        "74.5 GiB); use more GPUs a worker or larger ones, or leave the tasks out"
    )


def test_dora_is_not_shared() -> None:
    lora = {"languageRank": 16, "dora": True}
    spec = run("internvl2-llama3-76b-lora", 8, lora=lora)
    (violation,) = check_spec(spec, InCluster(gpu_memory=parse_bytes("80GB"))).violations
    assert "1 GPUs (DoRA cannot be computed by several GPUs together)" in violation.message
    assert check_spec({**spec, "evaluation": {}}, InCluster(gpu_memory=parse_bytes("80GB"))).violations == ()
