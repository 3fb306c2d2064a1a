import json

import pytest
import torch
from golden import KINDS, checkpoint
from internvl_trainer.model.checkpoint_format import (
    Architecture,
    UnsupportedArchitecture,
    native_config,
    read_architecture,
    to_native,
    to_upstream,
)
from internvl_trainer.model.checkpoint_format.tensors import IncompleteTensor, UnknownTensor
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

KIND_PARAMS = [pytest.param(kind, id=kind) for kind in KINDS]


def upstream_config(kind: str) -> dict[str, object]:
    value: dict[str, object] = json.loads((checkpoint(kind) / "config.json").read_text())
    return value


def small_internlm2() -> Architecture:
    return read_architecture(upstream_config("internlm2"))


@pytest.mark.parametrize("kind", KIND_PARAMS)
def test_there_and_back_is_equal_to_the_last_bit(kind: str) -> None:
    tensors = load_file(checkpoint(kind) / "model.safetensors")
    architecture = read_architecture(upstream_config(kind))
    back = dict(to_upstream(to_native(tensors.items(), architecture), architecture))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].numpy().tobytes() == tensor.numpy().tobytes(), name


@pytest.mark.parametrize("kind", KIND_PARAMS)
def test_native_names_and_shapes_are_those_of_the_native_model(kind: str) -> None:
    tensors = load_file(checkpoint(kind) / "model.safetensors")
    config = upstream_config(kind)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(native_config(config, image_token_id=5))
    mapped = {name: tensor.shape for name, tensor in to_native(tensors.items(), read_architecture(config))}
    assert mapped == {name: parameter.shape for name, parameter in model.named_parameters()}


def test_a_fused_projection_is_laid_out_by_kv_group() -> None:
    """Row r of wqkv says what it is: two KV groups of two query heads, one key and one value, 16 rows each."""
    architecture = small_internlm2()
    name = "language_model.model.layers.0.attention.wqkv.weight"
    fused = torch.arange(2 * 4 * 16).float().unsqueeze(1).expand(-1, 64).contiguous()
    parts = {
        name.split(".")[-2]: tensor[:, 0].int().tolist() for name, tensor in to_native([(name, fused)], architecture)
    }
    assert parts["q_proj"] == [*range(0, 32), *range(64, 96)]
    assert parts["k_proj"] == [*range(32, 48), *range(96, 112)]
    assert parts["v_proj"] == [*range(48, 64), *range(112, 128)]


def test_the_way_back_waits_for_parts_in_any_order() -> None:
    architecture = small_internlm2()
    name = "language_model.model.layers.0.attention.wqkv.weight"
    fused = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    parts = list(to_native([(name, fused)], architecture))
    ((back_name, back),) = to_upstream(reversed(parts), architecture)
    assert back_name == name
    assert torch.equal(back, fused)


def test_a_missing_part_is_named() -> None:
    architecture = small_internlm2()
    fused = torch.zeros(128, 64)
    parts = list(to_native([("language_model.model.layers.1.attention.wqkv.weight", fused)], architecture))
    with pytest.raises(IncompleteTensor) as caught:
        list(to_upstream(parts[:2], architecture))
    prefix = "model.language_model.layers.1.self_attn."
    assert str(caught.value) == (
        "language_model.model.layers.1.attention.wqkv.weight cannot be joined: "
        f"only {prefix}k_proj.weight, {prefix}q_proj.weight came"
    )


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(UnknownTensor) as caught:
        list(to_native([("language_model.model.layers.0.mystery.weight", torch.zeros(1))], small_internlm2()))
    assert str(caught.value) == (
        "tensor 'language_model.model.layers.0.mystery.weight' belongs to no part of a internlm2 InternVL model"
    )


def test_buffers_that_follow_from_the_config_are_left_out() -> None:
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    architecture = read_architecture(upstream_config("yi"))
    assert list(to_native([(name, torch.zeros(8))], architecture)) == []


@pytest.mark.parametrize("kind", KIND_PARAMS)
def test_weights_are_never_tied(kind: str) -> None:
    config = upstream_config(kind)
    config["llm_config"]["tie_word_embeddings"] = True  # type: ignore[index]
    native = native_config(config, image_token_id=5)
    assert native.tie_word_embeddings is False
    assert native.text_config.tie_word_embeddings is False  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        pytest.param("qwen2", {"rope_type": "default", "rope_theta": 1e6}, id="plain"),
        pytest.param("internlm2", {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}, id="dynamic NTK"),
        pytest.param("yi", {"rope_type": "default", "rope_theta": 5e6}, id="large base"),
    ],
)
def test_rotary_settings(kind: str, rope: dict[str, object]) -> None:
    found = native_config(upstream_config(kind), image_token_id=5).text_config.rope_parameters  # type: ignore[union-attr]
    assert {key: found[key] for key in rope} == rope


def test_phi3s_su_is_longrope() -> None:
    upstream = upstream_config("phi3")
    found = native_config(upstream, image_token_id=5).text_config.rope_parameters  # type: ignore[union-attr]
    assert found["rope_type"] == "longrope"
    assert found["long_factor"] == upstream["llm_config"]["rope_scaling"]["long_factor"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"model_type": "llava"},
            "model_type is 'llava'; expected 'internvl_chat' (upstream's format) or 'internvl' (transformers' own)",
            id="another model",
        ),
        pytest.param(
            {"llm_config": {"model_type": "mamba"}},
            "llm_config.model_type is 'mamba'; supported are qwen2, internlm2, llama, phi3",
            id="another language model",
        ),
        pytest.param({"llm_config": None}, "llm_config is missing or not an object", id="no language model"),
    ],
)
def test_other_architectures_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedArchitecture) as caught:
        read_architecture(upstream_config("qwen2") | change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("image_size", "tokens"),
    [pytest.param(448, 256, id="published"), pytest.param(224, 64, id="small"), pytest.param(56, 4, id="golden")],
)
def test_context_tokens_of_a_tile(image_size: int, tokens: int) -> None:
    assert read_architecture(upstream_config("qwen2") | {"force_image_size": image_size}).context_tokens == tokens
