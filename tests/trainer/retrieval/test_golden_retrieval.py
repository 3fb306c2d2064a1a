"""Upstream's losses, features, training steps and captions, from upstream's checkpoints."""

import pytest
import torch
from closeness import ADAMW, LOSS, assert_close
from internvl_trainer.model.attention import SDPA, choose_attention
from internvl_trainer.retrieval import load as load_module
from internvl_trainer.retrieval.attention import QLLAMA_REFERENCE, VISION_REFERENCE
from internvl_trainer.retrieval.load import LoadedRetrievalModel, describe_retrieval_checkpoint
from internvl_trainer.retrieval.model import normalise
from retrieval_golden import CASES, arrays, batch, checkpoint, load, results

CASE_PARAMS = [pytest.param(case, id=case) for case in CASES]


@pytest.fixture(scope="module", params=CASE_PARAMS)
def loaded(request: pytest.FixtureRequest) -> tuple[str, LoadedRetrievalModel]:
    return request.param, load(request.param)


def test_losses(loaded: tuple[str, LoadedRetrievalModel]) -> None:
    case, each = loaded
    with torch.no_grad():
        output = each.model(**batch(case))
    for name in ("loss", "loss_itc", "loss_itm"):
        assert_close(getattr(output, name), results(case)[name], LOSS, name=name)


@pytest.mark.parametrize("variant", ["C", "G"])
def test_features_and_logits(loaded: tuple[str, LoadedRetrievalModel], variant: str) -> None:
    case, each = loaded
    inputs, golden = batch(case), arrays(case)
    with torch.no_grad():
        images = each.model.encode_images(inputs["pixel_values"], [variant])[variant]
        texts = each.model.encode_texts(inputs["summarize_input_ids"])
        cosines = normalise(images.double()) @ normalise(texts.double()).T
        logits = (each.model.logit_scale.double().exp() * cosines).float()
    for name, found in (("image_features", images), ("text_features", texts), ("logits_per_image", logits)):
        assert_close(found, golden[f"{name}_{variant}"], name=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASE_PARAMS)
def test_training_steps(case: str, checkpointing: bool) -> None:
    model = load(case).model
    model.train(checkpointing)  # activations are recomputed in training mode only; there is no dropout in either
    model.set_gradient_checkpointing(checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for _ in results(case)["adamw_losses"]:
        loss = model(**batch(case)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert_close(losses, results(case)["adamw_losses"], ADAMW)


def test_parameter_count(loaded: tuple[str, LoadedRetrievalModel]) -> None:
    case, each = loaded
    assert sum(parameter.numel() for parameter in each.model.parameters()) == results(case)["parameters"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("generated", {"max_new_tokens": 10}, id="greedy"),
        pytest.param("generated_beams", {"max_new_tokens": 12, "min_new_tokens": 8, "num_beams": 5}, id="beams"),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_captions(name: str, settings: dict[str, int], use_cache: bool) -> None:
    """With prompts of several lengths in one batch, and the image features behind a key-value cache."""
    golden = arrays("cross-attention")
    inputs = [torch.from_numpy(golden[key]) for key in ("pixel_values", "prompt_input_ids", "prompt_attention_mask")]
    found = load("cross-attention").model.generate(*inputs, use_cache=use_cache, **settings)
    assert found.tolist() == golden[name].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_captions_where_nothing_cross_attends(use_cache: bool) -> None:
    """Of the first two images, from six placeholders and three tokens behind the learned slots."""
    golden = arrays("no-cross-attention")
    prompts = torch.from_numpy(golden["summarize_input_ids"][:2, :3])
    prompts = torch.nn.functional.pad(prompts, (6, 0))
    pixels = torch.from_numpy(golden["pixel_values"][:2])
    model = load("no-cross-attention").model
    found = model.generate(pixels, prompts, torch.ones_like(prompts), max_new_tokens=6, use_cache=use_cache)
    assert found.tolist() == golden["generated"].tolist()


@pytest.mark.parametrize("name", [choose_attention(torch.device("cuda"), flat=False), "sdpa"])
@pytest.mark.parametrize("case", CASE_PARAMS)
def test_fused_attention_is_the_same_model(case: str, name: str) -> None:
    """What runs on a GPU: no reference arithmetic, equal but for rounding."""
    with torch.no_grad():
        output = load(case, attn_implementation=name).model(**batch(case))
    assert_close(output.loss, results(case)["loss"], LOSS)


@pytest.mark.parametrize(
    ("device", "dtype", "asked", "expected"),
    [
        pytest.param("cpu", torch.float32, None, (VISION_REFERENCE, QLLAMA_REFERENCE), id="upstream's arithmetic"),
        pytest.param("cuda", torch.bfloat16, None, (SDPA, SDPA), id="a GPU"),
        pytest.param("cuda", torch.bfloat16, "eager", ("eager", "eager"), id="asked for"),
    ],
)
def test_the_device_decides_the_attention(
    device: str, dtype: torch.dtype, asked: str | None, expected: tuple[str, str]
) -> None:
    """The device of the weights: a model on the processor of a machine with a GPU keeps upstream's arithmetic."""
    architecture = describe_retrieval_checkpoint(checkpoint("cross-attention"))
    load_module._set_attention(architecture, asked, torch.device(device), dtype)
    found = (architecture.vision._attn_implementation, architecture.qllama._attn_implementation)
    assert found == expected


def test_eight_bit_pixels_are_normalised() -> None:
    model = load("cross-attention").model
    pixels = torch.randint(0, 256, (2, 3, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        found, wanted = (model.encode_images(each, ["C"])["C"] for each in (pixels, normalised))
    assert_close(found, wanted)
