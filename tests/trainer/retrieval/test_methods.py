"""What learns under full, head and lora, and how fast each layer does."""

from pathlib import Path

import pytest
import torch
from closeness import LOSS, assert_close
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from internvl_trainer.errors import UserError
from internvl_trainer.model.adapter_files import adapter_state_dict, load_adapter, read_adapter, save_adapter
from internvl_trainer.model.adapters import LoraSettings
from internvl_trainer.retrieval.layer_decay import (
    LayerDecay,
    describe_groups,
    group_key,
    layer_groups,
    learning_rate_scale,
)
from internvl_trainer.retrieval.methods import HEAD, apply_retrieval_method
from internvl_trainer.retrieval.model import RetrievalModel
from internvl_trainer.train.engine import set_learning_rate
from retrieval_golden import batch, load

LAYERS = {"vision": 48, "qllama": 32}
CASE = "cross-attention"


def learning(model: RetrievalModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_trains_everything() -> None:
    model = load(CASE).model
    report = apply_retrieval_method(model, "full")
    assert report.trainable == report.total == 88803


def test_head_trains_what_the_guide_unfreezes() -> None:
    model = load(CASE).model
    report = apply_retrieval_method(model, "head")
    assert learning(model) == set(HEAD)
    assert report.trainable == 120 * 32 + 32 * 12  # the language head and the projection of texts


def test_lora_trains_adapters_of_both_towers_and_the_head() -> None:
    """Counted as upstream's: one A for the fused qkv of a vision layer, none in cross-attention."""
    model = load(CASE).model
    report = apply_retrieval_method(model, "lora", lora=LoraSettings(language_rank=4, vision_rank=2))
    adapters = learning(model) - set(HEAD)
    assert all(".lora_" in name and "cross_attn" not in name for name in adapters)
    vision = 2 * 2 * ((24 + 72) + (24 + 24) + (24 + 40) + (40 + 24))  # rank, layers, widths in and out
    qllama = 4 * 5 * (4 * (32 + 32) + 3 * (32 + 48))
    assert report.by_tower["vision"][0] == vision
    assert report.trainable == vision + qllama + 120 * 32 + 32 * 12


@pytest.mark.parametrize(
    ("method", "lora", "reason"),
    [
        pytest.param("freeze", LoraSettings(language_rank=4), "UnknownMethod", id="unknown"),
        pytest.param("lora", LoraSettings(), "LoraRankMissing", id="no rank"),
    ],
)
def test_mistakes_are_named(method: str, lora: LoraSettings, reason: str) -> None:
    with pytest.raises(UserError) as error:
        apply_retrieval_method(load(CASE).model, method, lora=lora)
    assert error.value.reason == reason


def test_a_trained_adapter_is_saved_loaded_and_merged(tmp_path: Path) -> None:
    model = load(CASE).model
    apply_retrieval_method(model, "lora", lora=LoraSettings(language_rank=4, vision_rank=2, dropout=0.0))
    adapters = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    optimizer = torch.optim.SGD(adapters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch(CASE)).loss.backward()
        optimizer.step()
    save_adapter(model, tmp_path)
    gathered = {name: parameter.detach() for name, parameter in model.named_parameters()}  # as from partitioned ranks
    for name, tensor in adapter_state_dict(model, gathered).items():
        assert torch.equal(tensor, read_adapter(tmp_path).tensors[name])
    with torch.no_grad():
        wanted = model(**batch(CASE)).loss
        before = load(CASE).model(**batch(CASE)).loss
        assert abs(float(wanted - before)) > 0.1

        again = load(CASE).model
        load_adapter(again, tmp_path)
        assert torch.equal(again.eval()(**batch(CASE)).loss, wanted)

        merged = load(CASE).model
        adapter = read_adapter(tmp_path)
        for name, weight in merged.named_parameters():
            weight.copy_(adapter.merge(name.removesuffix(".weight"), weight))
        assert_close(merged(**batch(CASE)).loss, wanted, LOSS)


@pytest.mark.parametrize(
    ("name", "dimensions", "group", "power"),
    [
        pytest.param("vision_tower.embeddings.position_embeddings", 3, "vision/inputs", 49, id="patches"),
        pytest.param("vision_tower.encoder.layer.0.mlp.fc1.weight", 2, "vision/layer 0", 48, id="first vision layer"),
        pytest.param(
            "vision_tower.encoder.layer.47.lambda_1", 1, "vision/layer 47/no weight decay", 1, id="last vision layer"
        ),
        pytest.param("clip_projector.cross_attn.q.weight", 2, "vision/head", 0, id="pooled vision"),
        pytest.param("query_tokens", 3, "qllama/inputs", 33, id="queries"),
        pytest.param("logit_scale", 1, "qllama/inputs/no weight decay", 33, id="temperature"),
        pytest.param("qllama.model.embed_tokens.weight", 2, "qllama/inputs", 33, id="tokens"),
        pytest.param("qllama.model.layers.8.cross_attn.k_proj.weight", 2, "qllama/layer 8", 24, id="cross-attention"),
        pytest.param("qllama.model.layers.31.mlp.up_proj.weight", 2, "qllama/layer 31", 1, id="last QLLaMA layer"),
        pytest.param(
            "qllama.model.layers.3.self_attn.q_proj.lora_A.default.weight", 2, "qllama/layer 3", 29, id="an adapter"
        ),
        pytest.param("qllama.model.norm.weight", 1, "qllama/head/no weight decay", 0, id="final norm"),
        pytest.param("qllama.lm_head.weight", 2, "qllama/head/no weight decay", 0, id="language head, never reached"),
        pytest.param("text_projection", 2, "qllama/head", 0, id="projection"),
        pytest.param("clip_projector2.proj.bias", 1, "qllama/head/no weight decay", 0, id="pooled queries"),
        pytest.param("itm_head.weight", 2, "qllama/head", 0, id="matching head"),
    ],
)
def test_rate_of_a_parameter(name: str, dimensions: int, group: str, power: int) -> None:
    """Scales are upstream's (get_num_layer_for_vit_and_qllama); each tower has its own factor."""
    key = group_key(name, dimensions)
    assert key.name == group
    factors = LayerDecay(vision=0.9, qllama=0.8)
    factor = {"vision": 0.9, "qllama": 0.8}[key.tower]
    assert learning_rate_scale(key, LAYERS, factors) == pytest.approx(factor**power)


def rates_after_warm_up(schedule: str) -> dict[str, float]:
    """Each group's rate at the end of a warm-up to 1e-6, as the optimizer has it."""
    groups = layer_groups(load(CASE).model, 0.05, LayerDecay())
    optimizer = torch.optim.AdamW(groups, lr=1e-6)
    if schedule == "upstream's DeepSpeed setting":
        scheduler = WarmupDecayLR(optimizer, 1000, warmup_min_lr=0.0, warmup_max_lr=1e-6, warmup_num_steps=100)
        for _ in range(101):
            scheduler.step()
    else:
        set_learning_rate(optimizer.param_groups, 1e-6)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def decays_with_depth(rates: dict[str, float]) -> bool:
    """Whether rates are 1e-6 x 0.9^depth in a model of 2 vision and 5 QLLaMA layers."""
    powers = {"vision/head": 0, "vision/layer 1": 1, "vision/layer 0": 2, "vision/inputs": 3}
    powers |= {"qllama/head": 0, "qllama/inputs": 6} | {f"qllama/layer {layer}": 5 - layer for layer in range(5)}
    return all(rates[name] == pytest.approx(1e-6 * 0.9**power) for name, power in powers.items())


def test_decay_really_applies() -> None:
    assert decays_with_depth(rates_after_warm_up("ours"))


def test_upstreams_scheduler_would_cancel_it() -> None:
    assert not decays_with_depth(rates_after_warm_up("upstream's DeepSpeed setting"))


def test_groups_hold_each_learning_parameter_once_and_are_described() -> None:
    model = load(CASE).model
    groups = layer_groups(model, 0.05, LayerDecay())
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    lines = describe_groups(groups, 1e-6).splitlines()
    assert len(lines) == len(groups)
    words = [" ".join(line.split()) for line in lines]
    assert "vision/layer 0 lr 8.1000e-07 (x0.8100) weight decay 0.05 6 tensors" in words
    apply_retrieval_method(model, "head")
    assert [group["name"] for group in layer_groups(model, 0.05, LayerDecay())] == [
        "qllama/head",
        "qllama/head/no weight decay",
    ]


def test_full_training_reaches_all_but_the_language_head() -> None:
    """What UNREACHED says, which weight decay alone would shrink."""
    model = load(CASE).model
    model(**batch(CASE)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == ["qllama.lm_head.weight"]
