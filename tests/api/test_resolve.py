"""What a user wrote becomes one RunConfig, or one message that says what to change."""

import copy

import pytest
from internvl_api.catalogue import CATALOGUE
from internvl_api.listing import recipe_config
from internvl_api.recipes import load_recipe, recipe_names
from internvl_api.resolve import SpecError, parse_spec, resolve
from internvl_api.retrieval import RETRIEVAL_MODELS
from internvl_api.run_config import RunConfig

DATA = {"train": {"pets": {"annotation": "s3://data/pets.jsonl"}}}
MINIMAL = {"model": {"source": "s3://models/tiny"}, "data": DATA, "output": "s3://models/out"}


def run_config(**overrides: object) -> RunConfig:
    return resolve(parse_spec({**copy.deepcopy(MINIMAL), **overrides}), job="team-a/pets", job_uid="u1")


@pytest.mark.parametrize(
    ("overrides", "reason", "message"),
    [
        pytest.param(
            {"recipe": "internvl2-2b-lor"},
            "UnknownRecipe",
            "spec.recipe: found 'internvl2-2b-lor', which no recipe is called (did you mean 'internvl2-2b-lora'?); "
            "see `recipes` in docs/",
            id="unknown recipe",
        ),
        pytest.param(
            {"model": {"name": "internvl2-2b"}},
            "UnknownModel",
            "spec.model.name: found 'internvl2-2b', which is not in the catalogue (did you mean 'InternVL2-2B'?); "
            "leave it out to use model.source",
            id="model name in the wrong case",
        ),
        pytest.param(
            {"model": {}},
            "ModelMissing",
            "spec.model: found neither name nor source; name a model or say where it is",
            id="no model at all",
        ),
        pytest.param(
            {"workers": 0},
            "InvalidSpec",
            "spec.workers: found 0: Input should be greater than or equal to 1",
            id="zero workers",
        ),
        pytest.param(
            {"workers": 3, "training": {"globalBatchSize": 16, "microBatchSize": 2}},
            "BatchNotDivisible",
            "spec.training.globalBatchSize: found 16, which 3 processes x microBatchSize 2 = 6 does not divide; "
            "use 12 or 18, or change workers, gpusPerWorker or microBatchSize",
            id="batch not divisible",
        ),
        pytest.param(
            {"workers": 8, "gpusPerWorker": 8, "training": {"globalBatchSize": 16}},
            "BatchNotDivisible",
            "spec.training.globalBatchSize: found 16, which 64 processes x microBatchSize 1 = 64 does not divide; "
            "use 64, or change workers, gpusPerWorker or microBatchSize",
            id="batch smaller than the world",
        ),
        pytest.param(
            {"data": {}},
            "InvalidSpec",
            "spec.data: found neither train nor meta; name at least one dataset",
            id="no data",
        ),
        pytest.param(
            {"lora": {"quantize": "nf4"}, "gpusPerWorker": 1},
            "QuantizeNotPossible",
            "spec.lora.quantize: found nf4 with method full; weights in 4 bits cannot learn, use method lora",
            id="4 bits in full",
        ),
        pytest.param(
            {"method": "lora", "lora": {"quantize": "nf4", "languageRank": 0}, "gpusPerWorker": 1},
            "QuantizeNotPossible",
            "spec.lora.quantize: found nf4 with languageRank 0; the language model would learn nothing, give it a rank",
            id="4 bits without an adapter",
        ),
        pytest.param(
            {"method": "lora", "lora": {"quantize": "nf4"}},
            "QuantizeNotPossible",
            "spec.lora.quantize: found nf4 with gpusPerWorker 0; weights in 4 bits need a GPU, ask for GPUs or leave "
            "it out",
            id="4 bits on CPUs",
        ),
        pytest.param(
            {"method": "lora", "lora": {"quantize": "nf4"}, "gpusPerWorker": 1, "training": {"zeroStage": 3}},
            "QuantizeNotPossible",
            "spec.lora.quantize: found nf4 with zeroStage 3, which cannot partition weights in 4 bits; "
            "use zeroStage 1 or 2",
            id="4 bits partitioned",
        ),
        pytest.param(
            {"image": {"minDynamicPatch": 7, "maxDynamicPatch": 6}},
            "InvalidSpec",
            "spec.image: minDynamicPatch 7 exceeds maxDynamicPatch 6",
            id="tile bounds crossed",
        ),
        pytest.param(
            {"data": {**DATA, "maxBadRows": 3}},
            "InvalidSpec",
            "spec.data: maxBadRows needs badRows: skip",
            id="budget without skip",
        ),
        pytest.param(
            {"wokers": 2},
            "InvalidSpec",
            "spec.wokers: there is no such field (did you mean 'workers'?)",
            id="misspelt field",
        ),
    ],
)
def test_a_mistake_is_named_with_the_next_step(overrides: dict, reason: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        run_config(**overrides)
    assert (caught.value.reason, str(caught.value)) == (reason, message)


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_a_spec_that_is_no_object_is_refused(raw: object) -> None:
    with pytest.raises(SpecError, match="expected an object"):
        parse_spec(raw)


def test_a_recipe_supplies_what_the_user_left_out_and_no_more() -> None:
    config = run_config(
        recipe="internvl2-2b-lora-coco", training={"learningRate": 1e-3}, model={"source": "s3://models/mine"}
    )
    assert config.training.learning_rate == 1e-3, "the user's word wins"
    assert config.training.global_batch_size == 512, "the recipe's value stays under it"
    assert config.lora.language_rank == 128
    assert config.image.max_dynamic_patch == 6
    assert (config.model.source, config.model.template) == ("s3://models/mine", "internlm2-chat")
    assert (config.workers, config.processes_per_worker, config.device) == (1, 8, "cuda")
    assert config.gradient_accumulation == 16, "512 = 4 a forward x 8 GPUs x 16"


def test_an_adapters_kind_reaches_the_run() -> None:
    plain = run_config(recipe="internvl2-2b-lora-coco").lora
    assert (plain.dora, plain.quantize) == (False, None)
    chosen = run_config(recipe="internvl2-2b-lora-coco", lora={"dora": True, "quantize": "nf4"}).lora
    assert (chosen.dora, chosen.quantize, chosen.language_rank) == (True, "nf4", 128)


def test_a_catalogue_name_brings_source_and_template() -> None:
    config = run_config(model={"name": "InternVL2-40B"})
    assert (config.model.source, config.model.template) == ("hf://OpenGVLab/InternVL2-40B", "Hermes-2")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_keeps_its_scripts_global_batch(name: str) -> None:
    config = recipe_config(name)
    written = load_recipe(name)["training"]["globalBatchSize"]
    assert config.gradient_accumulation * config.training.micro_batch_size * config.world_size == written
    assert config.model.name in {*CATALOGUE, *RETRIEVAL_MODELS}


def test_run_yaml_survives_the_round_trip(tmp_path) -> None:
    config = run_config(recipe="internvl2-8b-full")
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.load(path) == config
    assert RunConfig.load(path).to_yaml() == config.to_yaml(), "equal configurations have equal text"


def test_a_trailing_slash_does_not_make_another_output() -> None:
    assert run_config(output="s3://models/out/").output == run_config().output
