"""Upstream's logits, losses, training steps and answers, from upstream's checkpoints on native classes."""

import numpy as np
import pytest
import torch
from golden import CASES, RESULTS, ROWS, arrays, load, sample
from internvl_trainer.data.collate import collate
from internvl_trainer.model.answer import answer
from internvl_trainer.model.load import LoadedModel

CASE_PARAMS = [pytest.param(case, id=case) for case in CASES]
CAPTION_PROMPT = "<image>\nProvide a one-sentence caption for the provided image."
CAPTION_TOKENS = 12


@pytest.fixture(scope="module", params=CASE_PARAMS)
def loaded(request: pytest.FixtureRequest) -> tuple[str, LoadedModel]:
    model = load(request.param.split("/")[0])
    model.model.eval()
    return request.param, model


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_logits_and_loss(loaded: tuple[str, LoadedModel], row: int) -> None:
    case, model = loaded
    with torch.no_grad():
        output = model.model(**collate([sample(case, row)], pad_token_id=0), return_logits=True)
    assert output.logits is not None
    np.testing.assert_allclose(output.logits[0, -16:], arrays(case)[f"s{row}.logits_last16"], atol=2e-6, rtol=0)
    golden = RESULTS[case]["samples"][row]
    assert output.tokens == golden["supervised"]
    if golden["loss"] is None:
        assert output.loss_sum == 0
    else:
        assert float(output.loss_sum / output.tokens) == pytest.approx(golden["loss"], abs=2e-6)


@pytest.mark.parametrize("case", CASE_PARAMS)
def test_training_steps(case: str) -> None:
    golden = RESULTS[case]["adamw_steps"]
    model = load(case.split("/")[0]).model.train()
    model.vision_tower.requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {key: golden[key] for key in ("lr", "betas", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(learning, **options)
    losses = []
    for row in golden["order"]:
        output = model(**collate([sample(case, row)], pad_token_id=0))
        loss = output.loss_sum / output.tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(golden["losses"], abs=1e-5)


def test_greedy_caption(loaded: tuple[str, LoadedModel]) -> None:
    case, model = loaded
    golden = RESULTS[case]["greedy_caption"]
    tiles = sample(case, golden["sample"]).tiles
    text = answer(
        model, CAPTION_PROMPT, tiles, [len(tiles)], template=case.split("/")[1], max_new_tokens=CAPTION_TOKENS
    )
    assert text == golden["text"]
