"""Contrast, matching and mined negatives on numbers small enough to check by hand."""

import math

import torch
from closeness import LOSS, assert_close
from internvl_trainer.retrieval.losses import contrastive_loss, matching_loss, mine_negatives
from internvl_trainer.retrieval.model import RetrievalModel
from retrieval_golden import batch, load

EYE = torch.eye(2)
SCALE = torch.tensor(2.0)


def test_contrast_of_one_right_answer() -> None:
    """Each row's cosines are 1 and 0: log(1 + e^-2) four times, halved twice."""
    loss = contrastive_loss(EYE, EYE, EYE, torch.tensor([1, 2]), SCALE)
    assert_close(loss, 2 * math.log(1 + math.exp(-2)), LOSS)


def test_captions_of_one_image_share_the_target() -> None:
    """With one image id for both rows, the target is a half each, and cosines 1 and 0 cost log(1 + e^-2) + 1."""
    loss = contrastive_loss(EYE, EYE, EYE, torch.tensor([3, 3]), SCALE)
    assert_close(loss, 2 * (math.log(1 + math.exp(-2)) + 1), LOSS)


def test_matching() -> None:
    negatives, positives = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    wanted = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert_close(matching_loss(negatives, positives), wanted, LOSS)


def test_mined_negatives_are_alike_and_of_other_images() -> None:
    torch.manual_seed(0)
    texts = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2]])
    drawn = torch.stack(
        [mine_negatives(texts, texts, torch.tensor([1, 1, 2, 3]), torch.tensor(20.0)) for _ in range(50)]
    )
    assert set(drawn[:, 0].tolist()) == {3}  # row 1 is its own image, row 2 is nothing like it
    assert set(drawn[:, 3].tolist()) == {0, 1}


def test_a_batch_of_one_image_has_nothing_to_mine() -> None:
    assert mine_negatives(EYE, EYE, torch.tensor([5, 5]), SCALE).tolist() == [-1, -1]


def seen_negatives(model: RetrievalModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The texts that matching paired with the images as negatives."""
    seen = []
    embed = model.qllama.model.embed_tokens
    handle = embed.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    *_, negatives, _ = torch.cat(seen).chunk(3)  # of summaries, negatives and positives, in one pass or two
    return negatives


def test_hard_negatives_replace_random_ones() -> None:
    """Every image gets a caption of another image of its batch; by default the dataset's random one stays."""
    torch.manual_seed(0)
    model, inputs = load("cross-attention").model, batch("cross-attention")
    assert torch.equal(seen_negatives(model, inputs), inputs["negative_input_ids"])
    model.hard_negatives = True
    positives = inputs["positive_input_ids"].tolist()
    for row, ids in enumerate(seen_negatives(model, inputs).tolist()):
        assert inputs["image_ids"][positives.index(ids)] != inputs["image_ids"][row]


def test_without_another_image_the_random_negative_stays() -> None:
    model, inputs = load("cross-attention", hard_negatives=True).model, batch("cross-attention")
    inputs["image_ids"] = torch.full((4, 1), 8)
    assert torch.equal(seen_negatives(model, inputs), inputs["negative_input_ids"])


def test_padding_changes_nothing() -> None:
    """Batches may be padded to their longest text or to a fixed length."""
    model, inputs = load("cross-attention").model, batch("cross-attention")
    padded = {
        name: torch.nn.functional.pad(each, (0, 5)) if "input_ids" in name or "mask" in name else each
        for name, each in inputs.items()
    }
    with torch.no_grad():
        assert_close(model(**padded).loss, model(**inputs).loss, LOSS)


def test_drop_path_drops_in_training_only() -> None:
    model, inputs = load("cross-attention", drop_path_rate=0.9).model, batch("cross-attention")
    plain = load("cross-attention").model
    torch.manual_seed(0)
    with torch.no_grad():
        still, dropped, wanted = model(**inputs).loss, model.train()(**inputs).loss, plain(**inputs).loss
    assert torch.equal(still, wanted)
    assert not torch.equal(dropped, wanted)
