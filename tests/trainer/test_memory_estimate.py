"""The estimate's coefficients, measured: every tensor of a training step is followed through the native model."""

import weakref
from dataclasses import replace

import pytest
import torch
from gpu.models import upstream_config
from internvl_api.memory import activations
from internvl_api.memory.estimate import memory
from internvl_api.memory.setup import Row, Setup, ZeroSettings
from internvl_api.models.catalogue import CatalogueModel, LanguageKind, LanguageModel, VisionTower
from internvl_api.recipes.summary import recipe_config
from internvl_trainer.model.adapters import Freeze, LoraSettings, apply_method
from internvl_trainer.model.chat_model import ChatModel
from internvl_trainer.model.checkpoint_format import native_config, read_architecture
from internvl_trainer.train.deepspeed_config import deepspeed_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import InternVLForConditionalGeneration

pytestmark = pytest.mark.slow

SMALL_TOWER = VisionTower("small", 64, 4, 2, 256, qkv_bias=True, qk_norm=False, layer_norm=True)
LARGE_TOWER = VisionTower("large", 96, 3, 2, 384, qkv_bias=False, qk_norm=True, layer_norm=False)
TOKENS, TILES, IMAGE_TOKEN = 640, 2, 9


class LiveBytes(TorchDispatchMode):
    """Bytes of storages that operations make, while they live; `known` storages do not count."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.live = known, {}
        self.current = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.known and key not in given and key not in self.live:
                self.live[key] = storage.nbytes()
                self.current += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self.current)
        return made

    def _forget(self, key: int) -> None:
        self.current -= self.live.pop(key, 0)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def a_setup(kind: LanguageKind, tower: VisionTower = SMALL_TOWER, **changes: object) -> Setup:
    language = LanguageModel("tiny", kind, 256, 4, 4, 4 if kind == "phi3" else 2, 1024, 97, kind == "qwen2")
    setup = Setup(
        model=CatalogueModel("tiny", tower, language, "Hermes-2"),
        world_size=1,
        zero_stage=1,
        global_batch=1,
        micro_batch=1,
        max_seq_length=TOKENS,
        max_tiles=TILES,
        tile_size=448,
        element_bytes=2,
        gradient_checkpointing=True,
        language_rank=0,
        vision_rank=0,
        learns_language=True,
        learns_vision=False,
        learns_projector=True,
    )
    return replace(setup, **changes)


def build(setup: Setup) -> ChatModel:
    """The native model of a setup's dimensions, ready to train."""
    upstream = upstream_config(setup.model)
    native = InternVLForConditionalGeneration(native_config(upstream, IMAGE_TOKEN))
    native.set_attn_implementation("sdpa")
    model = ChatModel(native, read_architecture(upstream))
    lora = setup.language_rank or setup.vision_rank
    apply_method(
        model,
        "lora" if lora else "full",
        freeze=Freeze(not setup.learns_vision, not setup.learns_projector, not setup.learns_language),
        lora=LoraSettings(setup.language_rank, setup.vision_rank),
    )
    model.set_gradient_checkpointing(setup.gradient_checkpointing)
    return model.to(torch.bfloat16 if setup.element_bytes == 2 else torch.float32).train()


def measure(setup: Setup, row: Row) -> int:
    """Peak bytes of a forward and a backward pass, without weights and gradients."""
    torch.manual_seed(0)
    model = build(setup)
    ids = torch.full((1, row.tokens), 5)
    ids[0, : row.tiles * 256] = IMAGE_TOKEN
    labels = torch.full_like(ids, -100)
    labels[0, row.tokens - row.supervised :] = 5
    batch = {"input_ids": ids, "labels": labels}
    if row.tiles:
        batch["pixel_values"] = torch.zeros(row.tiles, 3, 448, 448, dtype=next(model.parameters()).dtype)
    kept = [*model.parameters(), *model.buffers(), *batch.values()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            kept.append(parameter.grad)
    live = LiveBytes({tensor.untyped_storage()._cdata for tensor in kept})
    with live:
        model(**batch).loss_sum.backward()
    return live.peak


LORA = {"language_rank": 8, "learns_language": False, "learns_projector": False}


@pytest.mark.parametrize(
    ("setup", "tolerance"),
    [
        pytest.param(a_setup("internlm2"), 0.02, id="internlm2"),
        pytest.param(a_setup("internlm2", element_bytes=4), 0.02, id="internlm2, fp32"),
        pytest.param(a_setup("internlm2", gradient_checkpointing=False), 0.02, id="internlm2, no checkpointing"),
        pytest.param(a_setup("qwen2"), 0.02, id="qwen2"),
        pytest.param(a_setup("phi3"), 0.02, id="phi3"),
        pytest.param(a_setup("phi3", gradient_checkpointing=False, element_bytes=4), 0.02, id="phi3, fp32, no ckpt"),
        pytest.param(a_setup("qwen2", **LORA), 0.02, id="qwen2, lora"),
        pytest.param(a_setup("qwen2", **LORA, element_bytes=4), 0.02, id="qwen2, lora, fp32"),
        pytest.param(
            a_setup("qwen2", **LORA, gradient_checkpointing=False),
            0.05,
            id="qwen2, lora, no checkpointing",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            a_setup("internlm2", **LORA), 0.02, id="internlm2, lora with one A for q, k, v", marks=pytest.mark.soak
        ),
        pytest.param(a_setup("phi3", **LORA), 0.02, id="phi3, lora", marks=pytest.mark.soak),
        pytest.param(a_setup("qwen2", learns_vision=True), 0.10, id="small tower learns"),
        pytest.param(a_setup("qwen2", LARGE_TOWER, learns_vision=True), 0.10, id="large tower learns"),
        pytest.param(
            a_setup("qwen2", LARGE_TOWER, learns_vision=True, gradient_checkpointing=False), 0.10, id="large, no ckpt"
        ),
        pytest.param(a_setup("qwen2", vision_rank=8, learns_language=False), 0.10, id="adapter on the small tower"),
    ],
)
def test_activations_are_what_the_native_layers_need(setup: Setup, tolerance: float) -> None:
    row = Row(tokens=TOKENS, tiles=TILES, supervised=16)
    found = memory(setup, row)
    measured = measure(setup, row)
    assert found.activations + found.logits == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("positions", [140, 300], ids=["three chunks", "one chunk"])
@pytest.mark.parametrize("changes", [{}, LORA, {"element_bytes": 4}], ids=["full", "lora", "fp32"])
def test_logits_are_what_the_loss_needs(
    changes: dict[str, object], positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = a_setup("qwen2", **changes)
    wide = replace(setup, model=replace(setup.model, language=replace(setup.model.language, vocab=20_000)))
    monkeypatch.setattr(activations, "LOSS_CHUNK_BYTES", positions * activations.LOGIT_BYTES * 20_000)
    row = Row(tokens=TOKENS, tiles=1, supervised=300)
    found = memory(wide, row)
    assert found.logits > found.activations, "else this measures nothing"
    assert found.activations + found.logits == pytest.approx(measure(wide, row), rel=0.02)


def test_deepspeeds_settings_are_the_trainers() -> None:
    """What the estimate takes for granted is what the trainer asks DeepSpeed for."""
    usual = ZeroSettings()
    for recipe, stage in (("internvl2-2b-full", 1), ("internvl2-26b-full", 3)):
        zero = deepspeed_config(recipe_config(recipe), 8)["zero_optimization"]
        assert zero["stage"] == stage
        assert (zero["reduce_bucket_size"], zero["overlap_comm"], zero["contiguous_gradients"]) == (
            usual.reduce_bucket,
            usual.overlap,
            usual.contiguous_gradients,
        )
    assert zero["stage3_max_live_parameters"] == usual.max_live
    assert zero["stage3_param_persistence_threshold"] == usual.persistence_threshold
