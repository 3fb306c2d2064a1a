import json
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from golden import checkpoint, load
from internvl_trainer.errors import UserError
from internvl_trainer.model.adapter_files import (
    Adapter,
    adapter_state_dict,
    load_adapter,
    read_adapter,
    save_adapter,
)
from internvl_trainer.model.adapters import (
    Freeze,
    LoraSettings,
    apply_method,
    is_adapter,
    lora_layers,
    native_name,
    trainable_report,
)
from internvl_trainer.model.chat_model import ChatModel
from internvl_trainer.model.checkpoint_format import Architecture, native_config, read_architecture, to_upstream
from internvl_trainer.model.checkpoint_format.files import CheckpointError
from internvl_trainer.model.checkpoint_format.tensors import join_fused, match_upstream
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

pytestmark = pytest.mark.slow

BOTH = LoraSettings(language_rank=4, vision_rank=2)
DORA = LoraSettings(language_rank=4, vision_rank=2, use_dora=True)
SETTINGS = [pytest.param(BOTH, id="lora"), pytest.param(DORA, id="dora")]
KINDS = ["qwen2", "internlm2", "internlm2-vit6b", "yi", "llama3", "phi3"]


def merge_into(tensors: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: adapter.merge(name.removesuffix(".weight"), tensor) for name, tensor in tensors.items()}


def on_meta(kind: str, **language: int) -> ChatModel:
    """A model of another shape, without memory."""
    config = json.loads((checkpoint(kind) / "config.json").read_text())
    config["llm_config"].update(language)
    with torch.device("meta"):
        return ChatModel(InternVLForConditionalGeneration(native_config(config, 5)), read_architecture(config))


def adapted(kind: str, settings: LoraSettings = BOTH) -> ChatModel:
    """A model whose adapters do something."""
    model = load(kind).model.eval()
    apply_method(model, "lora", lora=settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.1)
    return model


@torch.no_grad()
def logits(model: ChatModel) -> torch.Tensor:
    """Of a text with one tile, whatever the kind."""
    context = torch.full((4,), model.native.config.image_token_id)
    ids = torch.cat([torch.arange(3, 40), context, torch.arange(40, 60)])[None]
    tile = torch.arange(3 * 56 * 56, dtype=torch.int64).remainder(251).to(torch.uint8).view(1, 3, 56, 56)
    output = model.eval()(ids, tile, return_logits=True)
    assert output.logits is not None
    return output.logits


def test_internvl2_2b_has_the_guides_number_of_trainable_parameters() -> None:
    with torch.device("meta"):
        model = on_meta(
            "internlm2",
            hidden_size=2048,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=8,
            intermediate_size=8192,
            vocab_size=92553,
        )
        report = apply_method(model, "lora", freeze=Freeze(vision=True, projector=True), lora=LoraSettings(128))
    assert report.by_tower["language"] == (125_829_120, 2_014_976_000)
    assert report.trainable == 125_829_120
    assert f"{100 * 125_829_120 / 2_014_976_000:.4f}" == "6.2447"


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_the_size_of_upstreams(kind: str) -> None:
    """One pair on each of upstream's linear layers: rank x (inputs + outputs)."""
    upstream = load_file(checkpoint(kind) / "model.safetensors")
    language = (".attention.w", ".feed_forward.w", "_proj.")
    vision = (".attn.qkv.", ".attn.proj.", ".mlp.fc")
    wanted = 0
    for name, tensor in upstream.items():
        if not name.endswith(".weight"):
            continue
        if name.startswith("language_model.") and any(part in name for part in language):
            wanted += 4 * sum(tensor.shape)
        if name.startswith("vision_model.") and any(part in name for part in vision):
            wanted += 2 * sum(tensor.shape)
    report = apply_method(load(kind).model, "lora", freeze=Freeze(projector=True), lora=BOTH)
    assert report.trainable == wanted


def test_alpha_is_twice_the_rank_for_each_tower() -> None:
    model = load("qwen2").model
    apply_method(model, "lora", lora=BOTH)
    query = model.language_model.layers[0].self_attn.q_proj
    patch = model.vision_tower.encoder.layer[0].attention.q_proj
    assert (query.r["default"], query.lora_alpha["default"], query.scaling["default"]) == (4, 8, 2)
    assert (patch.r["default"], patch.lora_alpha["default"], patch.scaling["default"]) == (2, 4, 2)
    assert query.lora_dropout["default"].p == 0.05


def test_only_fused_projections_share_their_a() -> None:
    fused, split = load("internlm2").model, load("qwen2").model
    for model in (fused, split):
        apply_method(model, "lora", lora=BOTH)
    query, key = (getattr(fused.language_model.layers[0].self_attn, f"{name}_proj") for name in "qk")
    assert query.lora_A["default"].weight is key.lora_A["default"].weight
    query, key = (getattr(split.language_model.layers[0].self_attn, f"{name}_proj") for name in "qk")
    assert query.lora_A["default"].weight is not key.lora_A["default"].weight
    query, value = (getattr(split.vision_tower.encoder.layer[0].attention, f"{name}_proj") for name in "qv")
    assert query.lora_A["default"].weight is value.lora_A["default"].weight


def test_adapters_start_equal_whatever_happened_before() -> None:
    torch.manual_seed(1)
    first = load("internlm2").model
    apply_method(first, "lora", lora=BOTH, seed=7)
    torch.rand(1000)
    before = torch.get_rng_state()
    second, other = load("internlm2").model, load("internlm2").model
    apply_method(second, "lora", lora=BOTH, seed=7)
    apply_method(other, "lora", lora=BOTH, seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    ours, theirs, third = (adapter_state_dict(model) for model in (first, second, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not all(torch.equal(ours[name], third[name]) for name in ours)


def test_new_adapters_change_nothing_yet() -> None:
    model = load("internlm2").model
    wanted = logits(model)
    apply_method(model, "lora", lora=BOTH)
    assert torch.equal(logits(model), wanted)


def test_dora_learns_a_length_for_each_row() -> None:
    plain, dora = load("internlm2").model, load("internlm2").model
    wanted = logits(plain)
    fewer = apply_method(plain, "lora", freeze=Freeze(projector=True), lora=BOTH).trainable
    more = apply_method(dora, "lora", freeze=Freeze(projector=True), lora=DORA).trainable
    rows = sum(layer.out_features for _, layer in lora_layers(dora))
    assert more - fewer == rows
    assert_close(logits(dora), wanted)  # lengths start as they are


def fused(adapter: Adapter, name: str, architecture: Architecture, *others: str) -> list[torch.Tensor]:
    """The one A of an upstream projection, and its parts' B (and others) joined as its weight is."""
    match = match_upstream(f"{name}.weight", architecture.kind)
    modules = [f"base_model.model.{native.removesuffix('.weight')}" for native in match.native_names]
    down, *same = (adapter.tensors[f"{module}.lora_A.weight"] for module in modules)
    assert all(torch.equal(down, other) for other in same)
    parts = [tuple(adapter.tensors[f"{module}.{part}"] for module in modules) for part in ("lora_B.weight", *others)]
    return [down, *(join_fused(each, match.rule, architecture) for each in parts)]


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_a_fused_dora_is_the_same_change_of_the_fused_weight(tower: str, tmp_path: Path) -> None:
    """Lengths are of rows, and rows only move: joined parts are what upstream's one layer would have."""
    model = adapted("internlm2", DORA)
    save_adapter(model, tmp_path)
    adapter = read_adapter(tmp_path)
    merged = dict(
        to_upstream(merge_into(load("internlm2").model.native.state_dict(), adapter).items(), model.architecture)
    )
    name = {
        "language": "language_model.model.layers.0.attention.wqkv",
        "vision": "vision_model.encoder.layers.0.attn.qkv",
    }[tower]
    base = load_file(checkpoint("internlm2") / "model.safetensors")[f"{name}.weight"]
    down, up, lengths = fused(adapter, name, model.architecture, "lora_magnitude_vector")
    changed = base + 2.0 * up @ down
    lengths = lengths / changed.norm(dim=1)
    assert_close(merged[f"{name}.weight"], changed * lengths[:, None])


@pytest.mark.parametrize(
    ("method", "freeze", "lora", "learning"),
    [
        pytest.param("full", Freeze(), None, {"vision", "projector", "language", "head"}, id="all"),
        pytest.param("full", Freeze(vision=True), None, {"projector", "language", "head"}, id="frozen vision"),
        pytest.param("full", Freeze(vision=True, language=True), None, {"projector"}, id="projector alone"),
        pytest.param("full", Freeze(True, True, True, lm_head=False), None, {"head"}, id="head alone"),
        pytest.param(
            "full", Freeze(True, True, True, vision_last_layers=1), None, {"last vision"}, id="last vision layer"
        ),
        pytest.param("lora", Freeze(True, True, True), LoraSettings(4), {"language lora"}, id="guide's lora"),
        pytest.param(
            "lora", Freeze(vision=True), LoraSettings(4), {"projector", "language lora"}, id="lora and projector"
        ),
        pytest.param("lora", Freeze(True, True, True), LoraSettings(0, 2), {"vision lora"}, id="vision lora"),
        pytest.param(
            "lora", Freeze(), LoraSettings(4, 2), {"projector", "language lora", "vision lora"}, id="lora on both"
        ),
    ],
)
def test_what_learns(method: str, freeze: Freeze, lora: LoraSettings | None, learning: set[str]) -> None:
    model = load("internlm2").model
    apply_method(model, method, freeze=freeze, lora=lora)

    def part(name: str) -> str:
        if "lm_head" in name:
            return "head"
        tower = "vision" if "vision_tower" in name else "projector" if "projector" in name else "language"
        if is_adapter(name):
            return f"{tower} lora"
        last = tower == "vision" and ".layer.1." in name and freeze.vision_last_layers
        return "last vision" if last else tower

    found = {part(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found == learning
    frozen = {part(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert not frozen & found


@pytest.mark.parametrize(
    ("method", "freeze", "lora", "reason", "message"),
    [
        pytest.param(
            "lora",
            Freeze(),
            None,
            "LoraRankMissing",
            "lora: method lora needs a lora_rank above 0 on a tower",
            id="no rank",
        ),
        pytest.param(
            "full",
            Freeze(True, True, True),
            None,
            "NothingToTrain",
            "freeze: every part is frozen and there is no adapter; unfreeze one",
            id="all frozen",
        ),
        pytest.param(
            "tune", Freeze(), None, "UnknownMethod", "method: method is 'tune'; expected full or lora", id="unknown"
        ),
    ],
)
def test_mistakes(method: str, freeze: Freeze, lora: LoraSettings | None, reason: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_method(load("qwen2").model, method, freeze=freeze, lora=lora)
    assert (caught.value.reason, str(caught.value)) == (reason, message)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_adapters_give_the_same_logits(kind: str, settings: LoraSettings, tmp_path: Path) -> None:
    model = adapted(kind, settings)
    save_adapter(model, tmp_path)
    again = load(kind).model
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert trainable_report(again).trainable == 0


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_peft_itself_reads_a_saved_adapter(kind: str, settings: LoraSettings, tmp_path: Path) -> None:
    model = adapted(kind, settings)
    save_adapter(model, tmp_path)
    plain = load(kind).model
    plain.native = PeftModel.from_pretrained(plain.native, tmp_path).get_base_model()
    assert_close(logits(plain), logits(model))


@pytest.mark.parametrize("settings", SETTINGS)
def test_files_are_like_those_that_peft_saves(settings: LoraSettings, tmp_path: Path) -> None:
    """So what reads PEFT's files without PEFT reads these, and what PEFT saved is read here."""
    model = adapted("internlm2", settings)
    save_adapter(model, tmp_path / "ours")
    PeftModel.from_pretrained(load("internlm2").model.native, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = load("internlm2").model
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(model))


def test_dora_lengths_named_as_in_the_model_are_read_too(tmp_path: Path) -> None:
    model = adapted("internlm2", DORA)
    save_adapter(model, tmp_path)
    plain = load("internlm2").model.native.state_dict()
    wanted = merge_into(plain, read_adapter(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed = {f"{name}.weight" if name.endswith("magnitude_vector") else name: tensors[name] for name in tensors}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)
    found = merge_into(plain, read_adapter(tmp_path))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    again = load("internlm2").model
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["internlm2", "phi3"])
def test_merged_weights_give_the_same_logits(kind: str, settings: LoraSettings, tmp_path: Path) -> None:
    model = adapted(kind, settings)
    save_adapter(model, tmp_path)
    merged = load(kind).model
    weights = merge_into(merged.native.state_dict(), read_adapter(tmp_path))
    merged.native.load_state_dict(weights)
    assert_close(logits(merged), logits(model))


def test_upstreams_fused_adapter_is_the_same_change_of_the_fused_weight(tmp_path: Path) -> None:
    """Adding upstream's B x A to wqkv is merging natively and going back."""
    model = adapted("internlm2")
    save_adapter(model, tmp_path)
    adapter = read_adapter(tmp_path)
    native = load("internlm2").model.native.state_dict()
    merged = dict(to_upstream(merge_into(native, adapter).items(), model.architecture))
    name = "language_model.model.layers.0.attention.wqkv"
    base = load_file(checkpoint("internlm2") / "model.safetensors")[f"{name}.weight"]
    down, up = fused(adapter, name, model.architecture)
    assert_close(merged[f"{name}.weight"], base + 2.0 * up @ down)


def test_gathered_state_with_a_shared_a_in_it_once_is_enough() -> None:
    """Where parameters are partitioned they are gathered by name, and a shared one has only its first name."""
    model = adapted("internlm2")
    gathered = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ours, theirs = adapter_state_dict(model), adapter_state_dict(model, gathered)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_names_of_weights_under_adapters_are_the_plain_models() -> None:
    plain = [name for name, _ in load("internlm2").model.native.named_parameters()]
    names = [native_name(name) for name, _ in adapted("internlm2").named_parameters()]
    assert sorted(name for name in names if name) == sorted(plain)


@pytest.mark.parametrize(
    ("file", "reason", "message"),
    [
        pytest.param(
            "adapter_config.json",
            "FileMissing",
            "adapter_config.json is missing; give an adapter's directory",
            id="config",
        ),
        pytest.param(
            "adapter_model.safetensors",
            "FileMissing",
            "adapter_model.safetensors is missing; give an adapter's directory",
            id="weights",
        ),
    ],
)
def test_an_incomplete_adapter(tmp_path: Path, file: str, reason: str, message: str) -> None:
    save_adapter(adapted("qwen2"), tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_adapter(load("qwen2").model, tmp_path)
    assert (caught.value.reason, caught.value.message) == (reason, message)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    save_adapter(adapted("phi3"), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(load("qwen2").model, tmp_path)
    assert caught.value.reason == "AdapterMismatch"
    assert caught.value.message.endswith("is this adapter for this model?")
