"""Upstream's logits, losses, training steps and answers, from upstream's checkpoints on native classes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import ADAMW, LOSS, another_order, assert_close, distance
from golden import CASES, RESULTS, ROWS, arrays, load, sample
from internvl_trainer.data.collate import collate
from internvl_trainer.model.chat_model import ChatModel, ChatOutput
from internvl_trainer.model.greedy_answers import answer
from internvl_trainer.model.load import LoadedModel

pytestmark = pytest.mark.slow

CASE_PARAMS = [pytest.param(case, id=case) for case in CASES]
CAPTION_PROMPT = "<image>\nProvide a one-sentence caption for the provided image."
CAPTION_TOKENS = 12


@pytest.fixture(scope="module", params=CASE_PARAMS)
def loaded(request: pytest.FixtureRequest) -> tuple[str, LoadedModel]:
    model = load(request.param.split("/")[0])
    model.model.eval()
    return request.param, model


def compute(case: str, model: ChatModel, row: int, **batch: torch.Tensor) -> ChatOutput:
    """What the model makes of a golden row, with some of its arguments replaced."""
    with torch.no_grad():
        return model(**collate([sample(case, row)]) | batch, return_logits=True)  # type: ignore[no-any-return]


def check(case: str, row: int, output: ChatOutput) -> None:
    """Against upstream's logits and loss."""
    assert output.logits is not None
    assert_close(output.logits[0, -16:], arrays(case)[f"s{row}.logits_last16"], name="logits")
    golden = RESULTS[case]["samples"][row]
    assert output.tokens == golden["supervised"]
    if golden["loss"] is None:
        assert output.loss_sum == 0
    else:
        assert_close(output.loss_sum / output.tokens, golden["loss"], LOSS, name="loss")


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_logits_and_loss(loaded: tuple[str, LoadedModel], row: int) -> None:
    case, model = loaded
    check(case, row, compute(case, model.model, row))


def train(case: str, **changes: Any) -> list[float]:
    """The losses of upstream's steps, with some of AdamW's options changed."""
    golden = RESULTS[case]["adamw_steps"]
    model = load(case.split("/")[0]).model.train()
    model.vision_tower.requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {key: golden[key] for key in ("lr", "betas", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(learning, **options | changes)
    losses = []
    for row in golden["order"]:
        output = model(**collate([sample(case, row)]))
        loss = output.loss_sum / output.tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("case", CASE_PARAMS)
def test_training_steps(case: str) -> None:
    assert_close(train(case), RESULTS[case]["adamw_steps"]["losses"], ADAMW)


@pytest.mark.parametrize("case", CASE_PARAMS)
def test_another_processors_rounding_is_accepted(case: str) -> None:
    model, row = load(case.split("/")[0]).model.eval(), 2
    plain = compute(case, model, row)
    with another_order():
        other = compute(case, model, row)
        losses = train(case)
    assert not torch.equal(plain.logits, other.logits)
    check(case, row, other)
    assert_close(losses, RESULTS[case]["adamw_steps"]["losses"], ADAMW)


def swap_layers(layers: torch.nn.ModuleList) -> None:
    first, second = (copy.deepcopy(layer.state_dict()) for layer in layers[:2])
    layers[0].load_state_dict(second)
    layers[1].load_state_dict(first)


def swap_vision_layers(model: ChatModel) -> None:
    swap_layers(model.vision_tower.encoder.layer)


def swap_language_layers(model: ChatModel) -> None:
    swap_layers(model.language_model.layers)


def scale_attention(model: ChatModel) -> None:
    """Raise the attention scale by 0.1 %."""
    for layer in model.language_model.layers:
        layer.self_attn.scaling *= 1.001


def use_another_gelu(model: ChatModel) -> None:
    model.projector.act = torch.nn.GELU(approximate="tanh")


def round_weights(model: ChatModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.half().float()


@pytest.mark.parametrize(
    "change", [swap_vision_layers, swap_language_layers, scale_attention, use_another_gelu, round_weights]
)
@pytest.mark.parametrize("case", CASE_PARAMS)
def test_another_model_is_refused(case: str, change: Callable[[ChatModel], None]) -> None:
    model = load(case.split("/")[0]).model.eval()
    change(model)
    with pytest.raises(AssertionError, match="logits: differs by"):
        check(case, 2, compute(case, model, 2))


@pytest.mark.parametrize("case", CASE_PARAMS)
def test_one_wrong_token_is_refused(case: str) -> None:
    """Both the logits and the loss show it."""
    model, row = load(case.split("/")[0]).model.eval(), 2
    ids = torch.from_numpy(sample(case, row).input_ids).clone()[None]
    ids[0, 1] += 1
    output = compute(case, model, row, input_ids=ids)
    with pytest.raises(AssertionError, match="logits: differs by"):
        check(case, row, output)
    assert distance(output.loss_sum / output.tokens, RESULTS[case]["samples"][row]["loss"]) > 10 * LOSS


@pytest.mark.parametrize("case", CASE_PARAMS)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"lr": 1.001e-3}, id="a rate higher by 0.1 %"),
        pytest.param({"betas": (0.89, 0.999)}, id="another first moment"),
        pytest.param({"betas": (0.9, 0.95)}, id="another second moment"),
    ],
)
def test_another_training_is_refused(case: str, changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="losses: differs by"):
        assert_close(train(case, **changes), RESULTS[case]["adamw_steps"]["losses"], ADAMW, name="losses")


def test_greedy_caption(loaded: tuple[str, LoadedModel]) -> None:
    case, model = loaded
    golden = RESULTS[case]["greedy_caption"]
    tiles = sample(case, golden["sample"]).tiles
    text = answer(
        model, CAPTION_PROMPT, tiles, [len(tiles)], template=case.split("/")[1], max_new_tokens=CAPTION_TOKENS
    )
    assert text == golden["text"]
