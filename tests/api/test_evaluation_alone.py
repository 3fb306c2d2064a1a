"""Method none: the stages of a run that only evaluates, what it takes from a recipe, and what its pods need."""

from typing import Any

import pytest
from internvl_api.memory.estimate import estimate
from internvl_api.memory.requests import needs
from internvl_api.memory.shortfall import shortfalls
from internvl_api.memory.stop_time import estimated_stop
from internvl_api.pipeline import stage_names
from internvl_api.quantity import GIB
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig
from internvl_api.spec import Training
from pydantic import ValidationError

CAPTIONS = {"coco": {"task": "caption-coco", "annotation": "s3://data/test.json"}}
VQA = {"pets": {"task": "vqa", "annotation": "s3://data/test.jsonl"}}
RETRIEVAL = {"flickr": {"task": "retrieval-flickr30k", "annotation": "s3://data/test.txt"}}
RETRIEVER = {"name": "InternVL-14B-224px", "source": "hf://OpenGVLab/InternVL-14B-Flickr30K-FT-364px"}


def alone(**changes: Any) -> dict[str, Any]:
    """A spec that evaluates InternVL2-2B; top-level fields replaced by `changes`."""
    base = {"model": {"name": "InternVL2-2B"}, "method": "none", "evaluation": {"tasks": VQA}, "output": "s3://out/run"}
    return base | changes


def resolved(**changes: Any) -> RunConfig:
    return resolve(parse_spec(alone(**changes)), job="team/check", job_uid="uid")


@pytest.mark.parametrize(
    ("tasks", "doctor", "stages"),
    [
        pytest.param(VQA, False, "preflight evaluate publish", id="questions"),
        pytest.param(CAPTIONS, False, "preflight evaluate score publish", id="captions"),
        pytest.param(CAPTIONS, True, "preflight doctor evaluate score publish", id="doctor"),
    ],
)
def test_stages(tasks: dict[str, Any], doctor: bool, stages: str) -> None:
    config = resolved(evaluation={"tasks": tasks}, doctor={"enabled": doctor}, gpusPerWorker=1)
    assert stage_names(config) == tuple(stages.split())


@pytest.mark.parametrize("workers", [3, 100])
def test_any_number_of_workers_answers(workers: int) -> None:
    config = resolved(workers=workers)
    assert (config.world_size, config.gradient_accumulation) == (workers, 1)


def test_a_recipe_gives_the_model_and_nothing_of_training() -> None:
    spec = parse_spec(alone(recipe="internvl2-5-8b-lora", model={}))
    assert (spec.model.name, spec.image.max_dynamic_patch) == ("InternVL2_5-8B", 6)
    assert spec.training == Training(precision="bf16")
    assert spec.lora.model_fields_set == spec.checkpoint.model_fields_set == set()


def test_an_adapter_is_read_from_its_address() -> None:
    model = {"name": "InternVL2-2B", "adapter": "s3://models/run/artifacts/adapter"}
    assert ("spec.model.adapter", model["adapter"]) in parse_spec(alone(model=model)).sources()
    assert resolved(model=model).model.adapter == model["adapter"]


@pytest.mark.parametrize(("training", "tokens"), [({}, 80), ({"maxSeqLength": 120}, 120)])
def test_captions_of_a_retrieval_model_are_cut_as_upstream_cuts_them(training: dict[str, Any], tokens: int) -> None:
    config = resolved(model=RETRIEVER, evaluation={"tasks": RETRIEVAL}, training=training)
    assert config.training.max_seq_length == tokens


@pytest.mark.parametrize("model", [{"name": "InternVL2-8B"}, RETRIEVER], ids=["chat", "retrieval"])
def test_no_estimate_is_of_training(model: dict[str, Any]) -> None:
    tasks = RETRIEVAL if model is RETRIEVER else VQA
    spec = parse_spec(alone(model=model, evaluation={"tasks": tasks}, gpusPerWorker=1))
    config = resolve(spec, job="team/check", job_uid="uid")
    assert (estimate(config, 8 * GIB), estimated_stop(config)) == (None, None)
    found = needs(config, "evaluate")
    assert found is not None
    assert list(found.disk) == ["weights of the base model"]
    assert shortfalls(spec, config) == []


def test_a_run_yaml_without_test_sets_is_refused() -> None:
    written = resolved().to_dict()
    assert RunConfig.model_validate(written).to_dict() == written
    with pytest.raises(ValidationError, match=r"evaluation\.tasks: found none with method none"):
        RunConfig.model_validate(written | {"evaluation": {}})
    adapted = written["model"] | {"adapter": "s3://models/adapter"}  # type: ignore[operator]
    with pytest.raises(ValidationError, match=r"model\.adapter: found an adapter with a method that trains"):
        RunConfig.model_validate(written | {"method": "full", "data": {"meta": "/meta.json"}, "model": adapted})
