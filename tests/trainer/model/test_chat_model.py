"""What the wrapper adds to the native model."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from closeness import GRADIENTS, LOSS, assert_close, assert_each_close
from golden import load, sample
from internvl_trainer.data.collate import collate
from internvl_trainer.data.sample import Sample
from internvl_trainer.model.adapters import Freeze, LoraSettings, apply_method
from internvl_trainer.model.chat_model import ChatModel, ChatOutput, normalise_tiles
from padded import pad_rows

CASE = "internlm2/internlm2-chat"
TEXT, IMAGE, IMAGES, VIDEO = (sample(CASE, row) for row in (1, 3, 4, 5))


@pytest.fixture
def model() -> ChatModel:
    return load("internlm2").model.eval()


def run(model: ChatModel, *samples: Sample, **options: object) -> ChatOutput:
    return model(**collate(samples), return_logits=True, **options)  # type: ignore[no-any-return]


def run_padded(model: ChatModel, *samples: Sample) -> ChatOutput:
    return model(**pad_rows(samples), return_logits=True)  # type: ignore[no-any-return]


def logits(output: ChatOutput) -> torch.Tensor:
    assert output.logits is not None
    return output.logits


def mean(output: ChatOutput) -> torch.Tensor:
    assert output.loss_sum is not None
    assert output.weight_sum is not None
    return output.loss_sum / output.weight_sum


@torch.no_grad()
def test_padding_changes_nothing(model: ChatModel) -> None:
    batch = run_padded(model, TEXT, IMAGE, VIDEO)
    for position, alone in enumerate((TEXT, IMAGE, VIDEO)):
        assert_close(logits(batch)[position, : alone.length], logits(run(model, alone))[0])


@torch.no_grad()
def test_one_sequence_of_rows_changes_nothing(model: ChatModel) -> None:
    packed = run(model, TEXT, IMAGE, VIDEO)
    start = 0
    for alone in (TEXT, IMAGE, VIDEO):
        here = logits(packed)[0, start : start + alone.length]
        assert_close(here, logits(run(model, alone))[0])
        start += alone.length


@torch.no_grad()
def test_the_loss_is_that_of_all_logits(model: ChatModel) -> None:
    output = run(model, TEXT, IMAGE)
    labels = collate([TEXT, IMAGE])["labels"]
    wanted = torch.nn.functional.cross_entropy(logits(output)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(mean(output), wanted, LOSS)
    assert output.tokens == (labels[:, 1:] != -100).sum()


@torch.no_grad()
def test_weights_count_each_token(model: ChatModel) -> None:
    output = model(**collate([TEXT, IMAGE], "sample"))
    wanted = (mean(run(model, TEXT)) + mean(run(model, IMAGE))) / 2
    assert_close(mean(output), wanted, LOSS)
    assert_close(output.weight_sum, 2.0, LOSS)


@torch.no_grad()
def test_a_row_without_supervision_adds_nothing(model: ChatModel) -> None:
    unsupervised = replace(TEXT, labels=np.full_like(TEXT.labels, -100))
    output = model(**collate([unsupervised]))
    assert (float(output.loss_sum), int(output.tokens), float(output.weight_sum)) == (0.0, 0, 0.0)


@torch.no_grad()
def test_what_is_on_a_blank_tile_does_not_matter(model: ChatModel) -> None:
    batch = collate([TEXT])
    wanted = model(**batch, return_logits=True).logits
    assert torch.equal(
        model(**{**batch, "pixel_values": 255 - batch["pixel_values"]}, return_logits=True).logits, wanted
    )
    without = {key: value for key, value in batch.items() if key not in ("pixel_values", "image_flags")}
    assert torch.equal(model(**without, return_logits=True).logits, wanted)


def test_text_alone_gives_every_parameter_a_gradient(model: ChatModel) -> None:
    """ZeRO waits for a gradient of each on every rank; the vision tower's are zero here, but there."""
    run(model, TEXT).loss_sum.backward()  # type: ignore[union-attr]
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(not parameter.grad.any() for parameter in model.vision_tower.parameters())
    run(model, IMAGE).loss_sum.backward()  # type: ignore[union-attr]
    assert all(parameter.grad.any() for name, parameter in model.projector.named_parameters())


def test_tiles_normalised_here_or_before_are_the_same(model: ChatModel) -> None:
    batch = collate([IMAGE])
    floats = {**batch, "pixel_values": normalise_tiles(batch["pixel_values"])}
    with torch.no_grad():
        assert torch.equal(logits(model(**batch, return_logits=True)), logits(model(**floats, return_logits=True)))


def test_a_batch_cut_inside_an_image_is_refused(model: ChatModel) -> None:
    batch = collate([IMAGE])
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][0, (batch["input_ids"][0] == 431).nonzero()[0]] = 5
    with pytest.raises(ValueError, match="the batch has 27 <IMG_CONTEXT> tokens but its tiles give 28 features"):
        model(**batch)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for enabled in (False, True):
        model = load("internlm2").model.train()
        model.set_drop_path(0.5)
        model.set_gradient_checkpointing(enabled)
        torch.manual_seed(1)
        run(model, TEXT, IMAGE).loss_sum.backward()  # type: ignore[union-attr]
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_each_close(gradients[1], gradients[0], GRADIENTS)


def test_checkpointing_leaves_a_frozen_tower_out_of_the_backward_pass() -> None:
    model = load("internlm2").model.train()
    model.set_gradient_checkpointing(True)
    model.vision_tower.requires_grad_(False)
    tiles = torch.from_numpy(IMAGE.tiles)
    assert model.vision_tower.embeddings(normalise_tiles(tiles)).requires_grad is False
    model.projector.requires_grad_(False)
    assert model.encode_tiles(tiles).requires_grad is False


def test_an_adapter_learns_the_same_with_checkpointing() -> None:
    """Its input does not require gradients: with the frozen embeddings, only the adapters do."""
    gradients = []
    for enabled in (False, True):
        model = load("internlm2").model.train()
        apply_method(model, "lora", freeze=Freeze(True, True, True), lora=LoraSettings(4, dropout=0.0))
        model.set_gradient_checkpointing(enabled)
        run(model, TEXT, IMAGE).loss_sum.backward()  # type: ignore[union-attr]
        gradients.append({name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.any() or ".lora_A." in name, name  # B starts as zeros, and A gets its gradient through it
    assert_each_close(gradients[1], gradients[0], GRADIENTS)


def drop_rates(model: ChatModel) -> Iterator[tuple[float, float]]:
    for layer in model.vision_tower.encoder.layer:
        yield round(layer.attention.projection_dropout.rate, 6), round(layer.dropout.rate, 6)


def test_drop_path_grows_over_the_layers_and_acts_in_training_only(model: ChatModel) -> None:
    with torch.no_grad():
        plain = logits(run(model, IMAGE))
        model.set_drop_path(0.4)
        assert list(drop_rates(model)) == [(0.0, 0.0), (0.4, 0.4)]
        assert torch.equal(logits(run(model, IMAGE)), plain)
        model.train()
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(logits(run(model, IMAGE)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], plain)


def test_drop_path_keeps_the_mean_of_a_branch() -> None:
    from internvl_trainer.model.chat_model import DropPath

    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(20_000, 3, 2))
    kept = dropped[:, 0, 0] != 0
    assert (dropped == dropped[:, :1, :1]).all()  # a tile's branch goes as a whole
    assert kept.float().mean() == pytest.approx(0.75, abs=0.02)
    assert dropped[kept].unique().tolist() == pytest.approx([1 / 0.75])


@torch.no_grad()
def test_pixel_shuffle_v1_has_height_and_width_swapped() -> None:
    second = load("internlm2").model
    first = load("internlm2", pixel_shuffle_version="v1").model
    tiles = torch.from_numpy(IMAGE.tiles[:1])
    # 4 x 4 patches become 2 x 2 tokens; swapping height and width swaps the middle two.
    wanted = second.encode_tiles(tiles)[:, [0, 2, 1, 3]]
    assert_close(first.encode_tiles(tiles), wanted)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, 1])
def test_features_from_an_earlier_layer(layer: int) -> None:
    model = load("internlm2", select_layer=layer).model
    tiles = torch.from_numpy(IMAGE.tiles[:2])
    native = model.native.model.get_image_features(normalise_tiles(tiles), vision_feature_layer=layer)
    assert_close(model.encode_tiles(tiles), native.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_generating_with_a_cache_is_the_same_as_without(kind: str) -> None:
    model = load(kind).model.eval()
    prompt = torch.from_numpy(sample("internlm2/internlm2-chat", 1).input_ids[None, :40]).clamp(max=390)
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    ids = prompt
    for _ in range(6):
        following = logits(model(ids, return_logits=True))[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    assert generated.tolist() == ids[:, 40:].tolist()
