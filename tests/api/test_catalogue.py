"""The catalogue's dimensions are those of the published models: they give the published counts."""

import pytest
from chat_recipes import chat_recipe_names
from internvl_api.models.catalogue import CATALOGUE, find_model
from internvl_api.recipes.files import load_recipe
from internvl_api.types import Template


def test_the_guides_trainable_parameters_come_out() -> None:
    """The COCO guide: "trainable params: 125,829,120 || all params: 2,014,976,000 || trainable%: 6.2447"."""
    language = CATALOGUE["InternVL2-2B"].language
    adapter = language.lora_parameters(128)
    assert adapter == 125_829_120
    assert language.parameters + adapter == 2_014_976_000


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # Parameters in the safetensors files of each Hub repository.
        pytest.param("InternVL2_5-1B", 938_193_024, id="Qwen2.5 with biases, small tower"),
        pytest.param("InternVL2_5-2B", 2_205_754_368, id="InternLM2"),
        pytest.param("InternVL2_5-4B", 3_712_637_952, id="Qwen2.5 whose embeddings were tied"),
        pytest.param("InternVL2_5-8B", 8_075_365_376, id="InternLM2.5-7B"),
        pytest.param("InternVL2_5-26B", 25_514_186_112, id="InternLM2.5-20B, large tower"),
        pytest.param("InternVL2_5-38B", 38_388_164_992, id="Qwen2.5-32B, large tower"),
        pytest.param("InternVL2_5-78B", 78_408_318_336, id="Qwen2.5-72B, large tower"),
        # 15,888,831,920 bytes of bf16, of which the files' headers are the rest.
        pytest.param("InternVL3-8B", 7_944_373_760, id="Qwen2.5-7B"),
    ],
)
def test_parameters_equal_the_published_count(name: str, published: int) -> None:
    assert CATALOGUE[name].parameters == published


@pytest.mark.parametrize(
    ("name", "billions", "template"),
    [
        ("InternVL-Chat-V1-2-Plus", 40.1, "Hermes-2"),
        ("InternVL-Chat-V1-5", 25.5, "internlm2-chat"),
        ("Mini-InternVL-Chat-2B-V1-5", 2.2, "internlm2-chat"),
        ("Mini-InternVL-Chat-4B-V1-5", 4.2, "phi3-chat"),
        ("InternVL2-1B", 0.9, "Hermes-2"),
        ("InternVL2-2B", 2.2, "internlm2-chat"),
        ("InternVL2-4B", 4.2, "phi3-chat"),
        ("InternVL2-8B", 8.1, "internlm2-chat"),
        ("InternVL2-26B", 25.5, "internlm2-chat"),
        ("InternVL2-40B", 40.1, "Hermes-2"),
        ("InternVL2-Llama3-76B", 76.3, "internlm2-chat"),
        ("InternVL3-1B", 0.9, "internvl2_5"),
        ("InternVL3-2B", 2.1, "internvl2_5"),
        ("InternVL3-9B", 9.1, "internvl2_5"),
        ("InternVL3-14B", 15.1, "internvl2_5"),
        ("InternVL3-38B", 38.4, "internvl2_5"),
        ("InternVL3-78B", 78.4, "internvl2_5"),
    ],
)
def test_size_and_template_are_those_of_the_model_card(name: str, billions: float, template: Template) -> None:
    model = CATALOGUE[name]
    assert model.parameters / 1e9 == pytest.approx(billions, abs=0.06)
    assert model.template == template
    assert model.hub_repository == f"OpenGVLab/{name}"


@pytest.mark.parametrize("model", CATALOGUE.values(), ids=CATALOGUE.keys())
def test_the_parts_make_the_whole(model) -> None:
    matrices = sum(elements * count for elements, count in model.matrices())
    vectors = model.parameters - matrices
    assert 0 < vectors < 0.015 * model.parameters, "biases, norms and embeddings of positions"
    assert model.context_tokens == 256
    assert model.language.hidden % model.language.heads == 0
    assert model.language.heads % model.language.kv_heads == 0


@pytest.mark.parametrize("name", chat_recipe_names())
def test_a_recipe_and_the_catalogue_agree(name: str) -> None:
    recipe = load_recipe(name)
    model = find_model(recipe["model"]["name"])
    assert model is not None
    assert recipe["model"]["template"] == model.template
    assert recipe["image"]["tileSize"] == model.tile_size
    assert recipe["image"]["maxDynamicPatch"] <= model.max_dynamic_patch


def test_an_unknown_name_is_no_model() -> None:
    assert find_model("InternVL2-3B") is None


def test_what_was_not_tried_is_said() -> None:
    assert {name for name, model in CATALOGUE.items() if model.caveat} == {"InternVL3-9B"}
