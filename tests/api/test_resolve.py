"""What a user wrote becomes one RunConfig, or one message that says what to change."""

import copy

import pytest
from internvl_api.models.catalogue import CATALOGUE
from internvl_api.models.kinds import RETRIEVAL_MODELS
from internvl_api.recipes.files import load_recipe, recipe_names
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.recipes.summary import recipe_config
from internvl_api.run_config import RunConfig
from internvl_api.validation.violations import SpecError

DATA = {"train": {"pets": {"annotation": "s3://data/pets.jsonl"}}}
MINIMAL = {"model": {"source": "s3://models/tiny"}, "data": DATA, "output": "s3://models/out"}


def run_config(**overrides: object) -> RunConfig:
    return resolve(parse_spec({**copy.deepcopy(MINIMAL), **overrides}), job="team-a/pets", job_uid="u1")


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


def test_a_recipe_for_another_model_brings_figures_but_no_template() -> None:
    config = run_config(recipe="internvl2-2b-lora-coco", model={"name": "InternVL2-1B"})
    assert (config.model.source, config.model.template) == ("hf://OpenGVLab/InternVL2-1B", "Hermes-2")
    assert config.training.global_batch_size == 512


def test_a_catalogue_name_brings_source_and_template() -> None:
    config = run_config(model={"name": "InternVL2-40B"})
    assert (config.model.source, config.model.template) == ("hf://OpenGVLab/InternVL2-40B", "Hermes-2")


@pytest.mark.parametrize(
    ("source", "name", "template"),
    [
        ("hf://OpenGVLab/InternVL2-26B", "InternVL2-26B", "internlm2-chat"),
        ("hf://OpenGVLab/InternVL2-26B@v1.0", "InternVL2-26B", "internlm2-chat"),
        ("hf://OpenGVLab/InternVL2-26B-AWQ", None, None),
        ("hf://someone/InternVL2-26B", None, None),
        ("s3://models/OpenGVLab/InternVL2-26B", None, None),
    ],
)
def test_the_repository_of_a_published_model_is_its_name(source: str, name: str | None, template: str | None) -> None:
    """So that its memory and time are estimated, although the run gives no name."""
    config = run_config(model={"source": source})
    assert (config.model.source, config.model.name, config.model.template) == (source, name, template)


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
