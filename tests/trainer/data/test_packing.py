"""Packs lose and repeat no row, come up alike after any accident, and give the losses that rows give alone."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import GRADIENTS, LOSS, assert_close, assert_each_close
from golden import CASES, ROWS, load, sample
from hypothesis import given
from hypothesis import strategies as st
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.data.collate import Weighting, collate, row_weight
from internvl_trainer.data.diagnostics import RowError
from internvl_trainer.data.loader import Collation, Failure, Loader, PackDataset, RowDataset, Window
from internvl_trainer.data.open_datasets import open_datasets, sample_settings
from internvl_trainer.data.packing import Pack, PackedOrder, PackLimits, pack_rows
from internvl_trainer.data.preflight_results import read_row_sizes
from internvl_trainer.data.sample import Sample
from internvl_trainer.data.sampler import Position
from internvl_trainer.errors import UserError
from internvl_trainer.stages.preflight import run as preflight
from internvl_trainer.train.chat import make_order
from internvl_trainer.train.engine import loss_shares
from padded import pad_rows
from trainer.contexts import context_of
from trainer.runs import make_config

pytestmark = pytest.mark.slow

PACKING = {"groupByLength": False, "packing": {"enabled": True, "maxTokens": 2048, "maxTiles": 12, "bufferSize": 3}}
CASE_PARAMS = [pytest.param(case, id=case) for case in CASES]
WEIGHTINGS: list[Weighting] = ["token", "sample", "square"]

sizes = st.lists(st.tuples(st.integers(1, 120), st.integers(0, 14)), max_size=200)
limits = st.builds(PackLimits, st.integers(20, 100), st.integers(1, 12), st.integers(1, 8))


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(rows, np.int32).reshape(-1, 2)
    return table[:, 0], table[:, 1]


# --- the packer ---


@given(sizes, limits)
def test_every_row_is_in_exactly_one_pack(rows: list[tuple[int, int]], limits: PackLimits) -> None:
    packs = list(pack_rows(*columns(rows), limits))
    assert sorted(chain(*packs)) == list(range(len(rows)))
    assert all(packs)


@given(sizes, limits)
def test_a_pack_keeps_its_limits_unless_one_row_alone_exceeds_them(
    rows: list[tuple[int, int]], limits: PackLimits
) -> None:
    for pack in pack_rows(*columns(rows), limits):
        tokens, tiles = sum(rows[row][0] for row in pack), sum(rows[row][1] for row in pack)
        assert len(pack) == 1 or (tokens <= limits.max_tokens and tiles <= limits.max_tiles)


@given(sizes, limits)
def test_no_more_packs_wait_than_the_buffer_holds(rows: list[tuple[int, int]], limits: PackLimits) -> None:
    """When a pack closes, fewer than bufferSize + 1 packs that were begun before its last row are still open."""
    packs = list(pack_rows(*columns(rows), limits))
    for number, pack in enumerate(packs):
        waiting = [later for later in packs[number + 1 :] if later[0] < pack[-1]]
        assert len(waiting) <= limits.buffer_size


@pytest.mark.parametrize(
    ("rows", "limits", "expected"),
    [
        pytest.param([(6, 0), (5, 0), (4, 0)], (10, 9, 5), [[0, 2], [1]], id="into the fullest with room"),
        pytest.param([(6, 2), (4, 2)], (10, 3, 5), [[0], [1]], id="tiles do not fit"),
        pytest.param([(11, 0), (1, 0)], (10, 9, 5), [[0], [1]], id="too long for any pack"),
        pytest.param([(5, 4), (1, 0)], (10, 3, 5), [[0], [1]], id="too many tiles for any pack"),
        pytest.param([(8, 0), (7, 0), (6, 0), (4, 0)], (10, 9, 2), [[0], [2, 3], [1]], id="full buffer: fullest goes"),
        pytest.param([(5, 0), (5, 0), (5, 0)], (10, 9, 5), [[0, 1], [2]], id="a full pack goes at once"),
        pytest.param([], (10, 9, 5), [], id="no rows"),
    ],
)
def test_which_rows_go_together(rows: list[tuple[int, int]], limits: Any, expected: list[list[int]]) -> None:
    assert list(pack_rows(*columns(rows), PackLimits(*limits))) == expected


def test_packs_are_nearly_full() -> None:
    tokens = np.random.default_rng(0).integers(200, 4000, 5000)
    packs = list(pack_rows(tokens, np.zeros_like(tokens), PackLimits(16384, 48, 20)))
    assert tokens.sum() / (16384 * len(packs)) > 0.98


# --- the order ---


def make_packs(rows: int = 57, global_batch: int = 4, seed: int = 1) -> PackedOrder:
    generator = np.random.default_rng(9)
    table = np.stack([generator.integers(5, 60, rows), generator.integers(0, 5, rows)], axis=1)
    return PackedOrder(table, PackLimits(100, 12, 4), global_batch, seed)


def test_each_epoch_of_packs_has_every_row_once_in_another_order() -> None:
    order = make_packs()
    draws = [draw for step in range(60) for pack in order.batch(step) for draw in pack]
    epochs = [[draw.row for draw in draws if draw.epoch == epoch] for epoch in range(3)]
    assert [sorted(rows) for rows in epochs] == [list(range(57))] * 3
    assert epochs[0] != epochs[1]


def test_no_pack_has_rows_of_two_epochs() -> None:
    assert all(len({draw.epoch for draw in pack}) == 1 for step in range(40) for pack in make_packs().batch(step))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_any_world_draws_the_same_packs_whenever_it_starts(world_size: int, micro_batch: int) -> None:
    expected = [make_packs().batch(step) for step in range(30)]
    for first in (0, 17):
        fresh = [make_packs() for _ in range(world_size)]
        ranks = [
            list(chain(*order.windows(first, 30, rank=rank, world_size=world_size, micro_batch=micro_batch)))
            for rank, order in enumerate(fresh)
        ]
        dealt = list(chain(*(part for parts in zip(*ranks, strict=True) for part in parts)))
        assert dealt == list(chain(*expected[first:]))


@pytest.mark.parametrize(
    ("epochs", "max_steps", "batches_of_packs"),
    [
        pytest.param(1, None, 1, id="one epoch"),
        pytest.param(3, None, 3, id="three epochs"),
        pytest.param(1, 1000, None, id="maxSteps alone decides, as upstream's endless stream has it"),
        pytest.param(50, 7, None, id="maxSteps ends it"),
    ],
)
def test_number_of_packed_steps(epochs: float, max_steps: int | None, batches_of_packs: int | None) -> None:
    order = make_packs()
    steps = order.count_steps(epochs, max_steps)
    if max_steps is not None:
        assert steps == max_steps
        return
    assert order.epochs_done(steps) <= epochs < order.epochs_done(steps + 1)
    assert order.count_steps(epochs + 0.5, None) > steps


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows to pack"):
        PackedOrder(np.empty((0, 2), np.int32), PackLimits(10, 1, 1), 1, 0)


# --- tensors ---


def golden_rows(case: str) -> list[Sample]:
    """Those that can be trained on."""
    return [sample(case, number, compat="default") for number in range(len(ROWS))]


@pytest.mark.parametrize("case", CASE_PARAMS)
def test_flat_padded_and_single_rows_have_the_same_loss(case: str) -> None:
    """In fp32 to 1e-6, for each language model and every implementation that runs here."""
    rows, kind = golden_rows(case), case.split("/")[0]
    model, plain = load(kind).model.eval(), load(kind, attn_implementation="sdpa").model.eval()
    with torch.no_grad():
        alone = [plain(**pad_rows([row])) for row in rows]
        batches = [model(**collate(rows)), model(**pad_rows(rows)), plain(**collate(rows)), plain(**pad_rows(rows))]
    tokens = sum(int(each.tokens) for each in alone)
    expected = sum(float(each.loss_sum) for each in alone) / tokens
    for output in batches:
        assert output.tokens == tokens
        assert_close(float(output.loss_sum / output.tokens), expected, 1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_follow_the_row_inside_a_pack(weighting: Weighting) -> None:
    rows = golden_rows("qwen2/Hermes-2")
    model = load("qwen2").model.eval()
    with torch.no_grad():
        alone = [model(**collate([row])) for row in rows]
        packed = model(**collate(rows, weighting))
        padded = model(**pad_rows(rows, weighting))
    counts = [int(each.tokens) for each in alone]
    powers = {"token": 0.0, "sample": 1.0, "square": 0.5}
    expected = sum(float(each.loss_sum) / n ** powers[weighting] for each, n in zip(alone, counts, strict=True))
    for output in (packed, padded):
        assert_close(output.loss_sum, expected, LOSS)
        assert_close(output.weight_sum, sum(n ** (1 - powers[weighting]) for n in counts), LOSS)


def test_a_row_cannot_see_its_neighbours() -> None:
    rows = golden_rows("qwen2/Hermes-2")
    model = load("qwen2").model.eval()
    end = rows[-1].length

    def last_row(pack: list[Sample]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(**collate(pack), return_logits=True).logits
        assert logits is not None
        return logits[0, -end:]

    assert_close(last_row(rows), last_row([rows[-1]]))
    assert_close(last_row(rows), last_row([rows[1], rows[-1]]))


def test_gradients_of_a_pack_are_those_of_its_rows() -> None:
    rows = golden_rows("qwen2/Hermes-2")

    def gradients(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        model = load("qwen2").model.train()
        for batch in batches:
            model(**batch).loss_sum.backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    alone = gradients([pad_rows([row]) for row in rows])
    assert_each_close(gradients([collate(rows)]), alone, GRADIENTS)
    assert_each_close(gradients([pad_rows(rows)]), alone, GRADIENTS)


def test_blank_tiles_stay_out_of_a_pack_with_pictures() -> None:
    rows = golden_rows("qwen2/Hermes-2")
    real = sum(int(row.image_flags.sum()) for row in rows)
    assert len(collate(rows)["pixel_values"]) == real < sum(len(row.tiles) for row in rows)
    text = next(row for row in rows if not row.image_flags.any())
    assert len(collate([text, text])["pixel_values"]) == 1, "the vision tower still runs"


@pytest.mark.parametrize(
    ("supervised", "weighting", "expected"),
    [(4, "token", 1.0), (4, "sample", 0.25), (4, "square", 0.5), (1, "sample", 1.0), (0, "square", 1.0)],
)
def test_weight_of_a_rows_tokens(supervised: int, weighting: Weighting, expected: float) -> None:
    labels = np.array([7, -100] + [5] * supervised)  # the first label has no token before it
    assert row_weight(labels, weighting) == expected


@pytest.mark.parametrize(
    ("data", "training", "expected"),
    [
        pytest.param({}, PACKING, [2 / 16, 2 / 16], id="every weight counts alike in the whole step"),
        pytest.param({"compat": "upstream"}, PACKING, [1 / (4 * 2), 1 / (4 * 2)], id="upstream's all-gather"),
        pytest.param({"compat": "upstream"}, {}, [1 / (3 * 2), 1 / (6 * 2)], id="upstream's mean of means"),
    ],
)
def test_what_the_loss_is_divided_by(data: Any, training: Any, expected: list[float]) -> None:
    config = make_config("/out", workers=2, data=data, training=training)
    own, everywhere = [3.0, 6.0], [8.0, 8.0]
    assert loss_shares(own, everywhere, 2, config) == pytest.approx(expected)


# --- from files to batches ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, RowDataset]:
    """A packed run after its preflight: configuration, storage, rows."""
    config = make_config(str(tmp_path_factory.mktemp("packed") / "out"), training=PACKING)
    storage = open_storage(config.output, field="spec.output")
    assert preflight(context_of(config, "preflight")).outcome == "succeeded"
    loaded = load("qwen2")
    settings = sample_settings(config, template=loaded.template, image_size=56, context_tokens=4)
    rows = RowDataset(open_datasets(config), settings, loaded.tokenizer, open_media, seed=3, bad_lines={})
    return config, storage, rows


def test_preflight_counts_what_rows_turn_out_to_be(prepared: tuple[Any, Any, RowDataset]) -> None:
    config, storage, rows = prepared
    counted = read_row_sizes(config, storage)
    assert counted is not None
    samples = [rows[Position(0, number)] for number in range(len(rows))]
    expected = [(row.length, int(row.image_flags.sum())) for row in samples if isinstance(row, Sample)]
    assert rows.sizes(counted).tolist() == [list(each) for each in expected]


def test_sizes_of_another_run_are_not_used(prepared: tuple[Any, Any, RowDataset]) -> None:
    config, storage, rows = prepared
    other = config.model_copy(update={"image": config.image.model_copy(update={"max_dynamic_patch": 2})})
    assert read_row_sizes(other, storage) is None
    with pytest.raises(UserError, match="run it first") as caught:
        make_order(other, rows, storage, image_tokens=4)
    assert caught.value.reason == "PreflightMissing"


def digest(window: Window) -> str:
    text = hashlib.sha256()
    for batch in window.batches:
        for name in sorted(batch):
            text.update(name.encode() + batch[name].numpy().tobytes())
    return text.hexdigest()


def windows(prepared: tuple[Any, Any, RowDataset], first: int, world: int = 1, rank: int = 0, micro: int = 1) -> Any:
    config, storage, rows = prepared
    order = make_order(config, rows, storage, image_tokens=4)
    loader = Loader(
        PackDataset(rows, config.training.packing.max_tokens),
        order.windows(first, 8, rank=rank, world_size=world, micro_batch=micro),
        collation=Collation(image_token_id=0, weighting="square"),
        workers=0,
        pin_memory=False,
    )
    return [loader.window() for _ in range(first, 8)]


@pytest.mark.parametrize("first", [1, 3, 7])
def test_batches_after_a_kill_are_bit_equal(prepared: tuple[Any, Any, RowDataset], first: int) -> None:
    undisturbed = [digest(window) for window in windows(prepared, 0)]
    assert len(set(undisturbed)) > 1
    assert [digest(window) for window in windows(prepared, first)] == undisturbed[first:]


@pytest.mark.parametrize(("world", "micro"), [(2, 1), (2, 2), (1, 2), (1, 4)])
def test_any_world_and_micro_batch_learns_the_same(
    prepared: tuple[Any, Any, RowDataset], world: int, micro: int
) -> None:
    alone = windows(prepared, 0)
    ranks = [windows(prepared, 0, world, rank, micro) for rank in range(world)]
    for expected, *parts in zip(alone, *ranks, strict=True):
        assert sum(part.tokens for part in parts) == expected.tokens
        assert sum(part.rows for part in parts) == expected.rows
        assert sum(sum(part.weights) for part in parts) == pytest.approx(sum(expected.weights), rel=1e-6)
        assert expected.places == expected.tokens, "one pack a forward needs no padding"


def test_a_row_that_grew_after_preflight_is_named(prepared: tuple[Any, Any, RowDataset]) -> None:
    _, _, rows = prepared
    pack: Pack = (Position(0, 0), Position(0, 1))
    found = PackDataset(rows, 10)[pack]
    assert isinstance(found, Failure)
    assert found.reason == "RowsChanged"
    assert "a pack planned for 10 tokens has" in found.message


def test_a_broken_row_in_a_pack_is_named(prepared: tuple[Any, Any, RowDataset], monkeypatch: Any) -> None:
    _, _, rows = prepared

    def broken(*_: Any, **__: Any) -> Sample:
        raise RowError.single("ImageMissing", "gone.jpg is not below the root", "image")

    monkeypatch.setattr("internvl_trainer.data.loader.build_sample", broken)
    found = PackDataset(rows, 2048)[(Position(0, 0), Position(0, 1))]
    assert isinstance(found, Failure)
    assert Path(found.message.split(":")[0]).name == "samples.jsonl"
