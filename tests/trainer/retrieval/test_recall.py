"""Recall by blocks against counting by hand, its ties, its memory, and features from a model."""

import subprocess
import sys

import pytest
import torch
from closeness import assert_close
from internvl_trainer.errors import UserError
from internvl_trainer.retrieval.recall import RANKS, image_features, rank, shares, text_features
from retrieval_golden import arrays, batch, load


def recall(*features: torch.Tensor, **options: int) -> dict[str, dict[int, float]]:
    """R@k both ways."""
    return {way: shares(places) for way, places in rank(*features, **options).by_way().items()}


def by_hand(queries: torch.Tensor, ids: list[int], answers: torch.Tensor, answer_ids: list[int]) -> dict[int, float]:
    """Sort all candidates, wrong before right among equals, and look for a right one among the first k."""
    found = dict.fromkeys(RANKS, 0)
    for query, own in zip(queries, ids, strict=True):
        scored = [(-float(query @ answer), of == own) for answer, of in zip(answers, answer_ids, strict=True)]
        for k in RANKS:
            found[k] += any(right for _, right in sorted(scored)[:k])
    return {k: count / len(ids) for k, count in found.items()}


@pytest.mark.parametrize("seed", range(200))
def test_equals_brute_force(seed: int) -> None:
    """Small whole numbers as features: many exact ties. Blocks of a few rows; several captions to an image."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(2, 14, (1,), generator=generator))
    captions = int(torch.randint(count, 40, (1,), generator=generator))
    spread = 2 if seed % 2 else 50
    images = torch.randint(-spread, spread + 1, (count, 3), generator=generator).float()
    texts = torch.randint(-spread, spread + 1, (captions, 3), generator=generator).float()
    image_ids = torch.randperm(100, generator=generator)[:count]
    owners = torch.cat([torch.arange(count), torch.randint(0, count, (captions - count,), generator=generator)])
    text_ids = image_ids[owners[torch.randperm(captions, generator=generator)]]
    found = rank(images, texts, image_ids, text_ids, block_bytes=12 * captions * 3)
    assert shares(found.image_to_text) == by_hand(images, image_ids.tolist(), texts, text_ids.tolist())
    assert shares(found.text_to_image) == by_hand(texts, text_ids.tolist(), images, image_ids.tolist())


IDS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("images", "to_text"),
    [
        pytest.param([[1.0, 0.0], [0.0, 1.0]], 1.0, id="right ones alone on top"),
        pytest.param([[1.0, 1.0], [0.0, 1.0]], 0.5, id="a wrong one as good as the right one"),
        pytest.param([[0.0, 0.0], [0.0, 0.0]], 0.0, id="features that say nothing"),
    ],
)
def test_ties_count_against_the_model(images: list[list[float]], to_text: float) -> None:
    assert shares(rank(torch.tensor(images), torch.eye(2), IDS, IDS).image_to_text)[1] == to_text


def test_two_right_captions_do_not_push_each_other_down() -> None:
    found = rank(torch.eye(2), torch.eye(2)[[0, 0, 1]], IDS, torch.tensor([1, 1, 2]))
    assert found.image_to_text.tolist() == [1, 1]
    assert found.text_to_image.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("images", "image_ids", "reason", "message"),
    [
        pytest.param(torch.full((2, 2), torch.nan), IDS, "FeaturesNotFinite", "features of images", id="not a number"),
        pytest.param(
            torch.eye(3)[:, :2], torch.tensor([1, 2, 9]), "UnmatchedRows", "1 of 3 have no caption.*image 9", id="alone"
        ),
        pytest.param(torch.eye(2)[:1], IDS[:1], "UnmatchedRows", "1 of 2 have no image.*image 2", id="image absent"),
    ],
)
def test_what_cannot_be_scored(images: torch.Tensor, image_ids: torch.Tensor, reason: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        rank(images, torch.eye(2), image_ids, IDS)
    assert error.value.reason == reason


MEMORY = """
import resource, torch
from internvl_trainer.retrieval.recall import rank
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
images = torch.nn.functional.normalize(torch.randn(5000, 768, generator=generator), dim=1)
ids = torch.arange(5000)
texts = images.repeat_interleave(5, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = rank(images, texts, ids, ids.repeat_interleave(5))
assert (found.image_to_text == 1).all() and (found.text_to_image == 1).all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.mark.slow
@pytest.mark.soak
def test_five_thousand_images_by_twenty_five_thousand_captions_within_a_gigabyte() -> None:
    """Of the width that InternVL-14B's features have."""
    ended = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 1 << 30


def test_features_of_a_model_batch_by_batch() -> None:
    model, inputs, golden = load("cross-attention").model, batch("cross-attention"), arrays("cross-attention")
    images = image_features(model, inputs["pixel_values"].split(3))
    texts = text_features(model, inputs["summarize_input_ids"].split(3))
    for variant, features in images.items():
        logits = float(model.logit_scale.detach().exp()) * features @ texts.T
        assert_close(logits, golden[f"logits_per_image_{variant}"])
    assert list(images) == ["C", "G"]
