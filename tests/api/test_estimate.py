"""The memory estimate: what ZeRO promises, what the guides saw, and what a user is told."""

from dataclasses import replace
from pathlib import Path

import pytest
from chat_recipes import chat_recipe_names
from internvl_api.memory.activations import LOSS_CHUNK_BYTES, loss_bytes, positions_per_chunk
from internvl_api.memory.advice import advice, largest_micro_batch, remedies
from internvl_api.memory.estimate import estimate, judge, memory
from internvl_api.memory.setup import Setup, longest_row, setup_of, typical_row
from internvl_api.memory.tables import GUIDE_ROWS, compare, fill
from internvl_api.quantity import GIB, amount, gib, parse_bytes
from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.recipes.summary import (
    estimate_lines,
    model_facts,
    recipe_config,
    recipe_lines,
    recipe_setup,
    recipe_text,
)
from internvl_api.validation.violations import SpecError

DOCUMENT = Path(__file__).parents[2] / "docs" / "memory.md"
BILLION = 10**9


def parts(setup: Setup, **changes: object) -> dict[str, int]:
    changed = replace(setup, **changes)
    return memory(changed, typical_row(changed)).parts


@pytest.fixture
def setup() -> Setup:
    """InternVL2-2B, all of its language model and projector, bf16."""
    return recipe_setup("internvl2-2b-full")


# --- what ZeRO promises (arXiv:1910.02054, figure 1, with 12 bytes of optimizer state) ---


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        pytest.param(1, 2, 2, 12 / 8, id="stage 1 shards the optimizer's state"),
        pytest.param(2, 2, 2 / 8, 12 / 8, id="stage 2 the gradients too"),
        pytest.param(3, 2 / 8, 2 / 8, 12 / 8, id="stage 3 the weights too"),
    ],
)
def test_each_zero_stage_shards_one_more_thing(
    setup: Setup, stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    all_sharded = replace(setup.zero, persistence_threshold=0)
    found = parts(setup, zero_stage=stage, world_size=8, zero=all_sharded)
    trained = setup.model.language.parameters + setup.model.projector_parameters
    assert setup.trainable_parameters == trained
    assert found["weights"] == pytest.approx(weights * setup.model.parameters, rel=0.01), "vectors are never sharded"
    assert found["gradients"] == pytest.approx(gradients * trained, rel=1e-6)
    assert found["optimizer"] == pytest.approx(optimizer * trained, rel=1e-6)


def test_one_gpu_gains_nothing_from_stages(setup: Setup) -> None:
    first, second = (parts(setup, world_size=1, zero_stage=stage) for stage in (1, 2))
    assert first == second


def test_small_matrices_stay_whole_under_zero_3(setup: Setup) -> None:
    sharded = parts(setup, zero_stage=3, zero=replace(setup.zero, persistence_threshold=0))
    persistent = parts(setup, zero_stage=3, zero=replace(setup.zero, persistence_threshold=10**12))
    assert persistent["weights"] == parts(setup, zero_stage=1)["weights"]
    assert sharded["weights"] < persistent["weights"] / 7


def test_an_adapter_pays_for_itself_alone() -> None:
    setup = recipe_setup("internvl2-2b-lora-coco")
    found = parts(setup, world_size=8)
    assert setup.trainable_parameters == 125_829_120
    assert found["gradients"] == 2 * 125_829_120
    assert found["optimizer"] == 12 * 125_829_120 / 8
    assert found["weights"] == 2 * (2_205_754_368 + 125_829_120)


@pytest.mark.parametrize(
    ("changes", "part", "grows"),
    [
        pytest.param({"micro_batch": 8}, "activations", True, id="twice the micro batch"),
        pytest.param({"max_tiles": 13}, "activations", True, id="more tiles"),
        pytest.param({"gradient_checkpointing": False}, "activations", True, id="no gradient checkpointing"),
        pytest.param({"learns_vision": True}, "activations", True, id="the vision tower learns"),
        pytest.param({"learns_vision": True}, "gradients", True, id="its gradients"),
        pytest.param({"learns_projector": False}, "gradients", False, id="a frozen projector"),
        pytest.param({"element_bytes": 4}, "weights", True, id="fp32 weights"),
        pytest.param({"world_size": 16}, "optimizer", False, id="more GPUs"),
    ],
)
def test_each_setting_moves_its_part(setup: Setup, changes: dict[str, object], part: str, grows: bool) -> None:
    before, after = parts(setup)[part], parts(setup, **changes)[part]
    assert (after > before) is grows
    assert after != before


def test_logits_are_paid_for_supervised_positions_alone(setup: Setup) -> None:
    whole, row = replace(setup, whole_logits=True), longest_row(setup)
    few, all_positions = (memory(whole, row._replace(supervised=count)) for count in (0, row.tokens))
    per_position = 12 * 92553
    grown = all_positions.activations + all_positions.logits - few.activations - few.logits
    assert grown <= setup.micro_batch * row.tokens * per_position
    assert all_positions.logits - few.logits > 0.7 * setup.micro_batch * row.tokens * per_position


@pytest.mark.parametrize(
    ("learns", "kept"),
    [
        pytest.param(False, 0, id="a frozen head"),
        pytest.param(True, 4 * 151_674 * 3_584, id="the sum of a trained head's gradients over chunks, in fp32"),
    ],
)
def test_logits_of_more_positions_than_a_chunk_cost_no_more(learns: bool, kept: int) -> None:
    model = recipe_setup("internvl3-8b-full").model.language
    chunk = positions_per_chunk(model.vocab)
    logits = [
        loss_bytes(model, 2, positions, learns=learns, whole=False) - 4 * positions * model.hidden
        for positions in (chunk, chunk + 1, 4 * 16_384)
    ]
    assert logits[0] <= LOSS_CHUNK_BYTES
    assert logits[1:] == [logits[0] + kept] * 2


def test_rows_never_exceed_the_longest_allowed(setup: Setup) -> None:
    short = replace(setup, max_seq_length=600, max_tiles=13)
    assert typical_row(short).tokens == longest_row(short).tokens == 600
    assert typical_row(short).tiles == 2, "more would not leave room for their own tokens"


def test_a_maximum_of_tokens_bounds_a_micro_batch(setup: Setup) -> None:
    many = replace(setup, micro_batch=16, max_seq_length=4096)
    row = longest_row(many)
    four = memory(replace(many, micro_batch=4), row).parts["activations"]
    assert memory(replace(many, max_tokens=4 * 4096), row).parts["activations"] == four
    assert memory(replace(many, max_tokens=1 << 20), row) == memory(many, row)
    assert memory(replace(many, max_tokens=4096), row) == memory(replace(many, micro_batch=1), row)


def test_the_users_deepspeed_settings_count() -> None:
    config = recipe_config("internvl2-8b-full")
    config.training.deepspeed = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1e8, "overlap_comm": False}
    }
    setup = setup_of(config)
    assert setup is not None
    found = memory(setup, typical_row(setup)).parts
    assert found["optimizer"] == 0
    assert found["buffers"] == 2 * 100_000_000


def test_a_datasets_own_tiles_count() -> None:
    spec = {
        "recipe": "internvl2-2b-full",
        "data": {"train": {"documents": {"annotation": "/d.jsonl", "maxDynamicPatch": 24}}},
        "output": "/out",
    }
    setup = setup_of(resolve(parse_spec(spec), job="a/b", job_uid="u"))
    assert setup is not None
    assert setup.max_tiles == 25, "24 and the thumbnail"


def test_a_model_outside_the_catalogue_has_no_estimate() -> None:
    config = recipe_config("internvl2-2b-full")
    config.model.name = None
    assert estimate(config, 80 * GIB) is None


# --- what the guides saw ---


@pytest.mark.parametrize("row", GUIDE_ROWS, ids=lambda row: f"{row.recipe}-{row.gpus}")
def test_what_the_guides_ran_is_not_called_too_large(row) -> None:
    """They ran on GPUs of 80 GiB. The estimate is of what is needed, nvidia-smi's figure of what the allocator kept."""
    for found in compare(row):
        assert found.estimate <= 80
        assert -0.65 <= found.error <= 0.28


@pytest.mark.parametrize(
    "row",
    [row for row in GUIDE_ROWS if row.recipe.startswith("mini-")],
    ids=lambda row: f"{row.recipe}-{row.gpus}",
)
def test_the_mini_rows_are_met_at_the_scripts_own_batch(row) -> None:
    _, script = compare(row)
    assert abs(script.error) <= 0.21


def test_the_document_holds_todays_tables() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert fill(text) == text, "run: python -m internvl_api.memory.tables docs/memory.md"
    assert text.count("| internvl2-2b-lora-coco |") == 2


def test_weights_in_4_bits_are_about_a_quarter() -> None:
    plain = replace(recipe_setup("internvl2-8b-lora"), zero_stage=1)
    quantized = replace(plain, quantized=True)
    row = typical_row(plain)
    saved = memory(plain, row).weights - memory(quantized, row).weights
    linear = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)  # InternLM2-7B's matrices
    assert saved == pytest.approx(linear * (2 - 0.516), rel=1e-3)
    others = {name: size for name, size in memory(plain, row).parts.items() if name != "weights"}
    assert others.items() <= memory(quantized, row).parts.items()


def test_no_advice_partitions_weights_in_4_bits() -> None:
    setup = replace(recipe_setup("internvl2-8b-lora"), zero_stage=1, quantized=True)
    for gpu_memory in ("7Gi", "10Gi", "14Gi"):
        assert "zeroStage 3" not in advice(judge(setup, parse_bytes(gpu_memory)))
        assert "zeroStage 3" in advice(judge(replace(setup, quantized=False), parse_bytes(gpu_memory)))


# --- what a user is told ---


@pytest.mark.parametrize(
    ("recipe", "gpus", "gpu_memory", "said"),
    [
        pytest.param(
            "internvl2-2b-lora",
            2,
            "80Gi",
            "Fits: 10.3 GiB of 80.0 GiB a GPU with the longest rows (microBatchSize 4), 8.1 GiB with typical rows.",
            id="fits",
        ),
        pytest.param(
            "internvl3-9b-full",
            8,
            "80Gi",
            "Fits typical rows (61.0 GiB of 80.0 GiB a GPU, microBatchSize 4), but a micro batch of the longest "
            "rows, 16384 tokens, needs 92.5 GiB: 12.5 GiB too much. What fits: microBatchSize 2 (71.7 GiB); "
            "maxSeqLength 11264 (79.6 GiB); zeroStage 2 (78.1 GiB); zeroStage 3 (63.8 GiB); method lora with "
            "languageRank 16 (66.4 GiB).",
            id="fits typical rows only",
        ),
        pytest.param(
            "internvl3-9b-full",
            8,
            "48Gi",
            "Does not fit: 61.0 GiB of 48.0 GiB a GPU with typical rows (microBatchSize 4), 13.0 GiB too much. What "
            "fits: zeroStage 2 (46.6 GiB); zeroStage 3 (32.4 GiB); method lora with languageRank 16 (29.7 GiB).",
            id="too large",
        ),
        pytest.param(
            "internvl2-8b-full",
            8,
            "22.3Gi",
            "Does not fit: 50.7 GiB of 22.3 GiB a GPU with typical rows (microBatchSize 4), 28.4 GiB too much. What "
            "fits: 8 GPUs with zeroStage 3, microBatchSize 1 and gradientCheckpointing true (22.2 GiB).",
            id="only everything together helps",
        ),
        pytest.param(
            "internvl2-8b-lora",
            1,
            "12Gi",
            "Does not fit: 22.8 GiB of 12.0 GiB a GPU with typical rows (microBatchSize 4), 10.8 GiB too much. What "
            "fits: 4 GPUs with zeroStage 3, microBatchSize 1 and gradientCheckpointing true (9.4 GiB).",
            id="more GPUs",
        ),
        pytest.param(
            "internvl2-llama3-76b-full",
            32,
            "4Gi",
            "Does not fit: 44.1 GiB of 4.0 GiB a GPU with typical rows (microBatchSize 1), 40.1 GiB too much. No "
            "setting makes it fit: use GPUs with more memory, or a smaller model.",
            id="nothing helps",
        ),
    ],
)
def test_advice_in_words(recipe: str, gpus: int, gpu_memory: str, said: str) -> None:
    setup = replace(recipe_setup(recipe), world_size=gpus)
    assert advice(judge(setup, parse_bytes(gpu_memory))) == said


@pytest.mark.parametrize("name", chat_recipe_names())
def test_what_is_advised_does_fit(name: str) -> None:
    found = judge(recipe_setup(name), 24 * GIB)
    for remedy in remedies(found) if found.verdict != "fits" else ():
        assert remedy.total <= 24 * GIB
        assert remedy.words in advice(found)


def test_the_largest_micro_batch_fits_and_the_next_does_not(setup: Setup) -> None:
    size = largest_micro_batch(setup, 30 * GIB)
    assert size == 8
    assert memory(replace(setup, micro_batch=size), longest_row(setup)).total <= 30 * GIB
    assert memory(replace(setup, micro_batch=2 * size), longest_row(setup)).total > 30 * GIB
    assert largest_micro_batch(setup, 30 * GIB, typical_row(setup)) == 16
    assert largest_micro_batch(setup, 8 * GIB) == 0


# --- rows for the command line ---


def test_every_recipe_has_a_line() -> None:
    lines = {line.name: line for line in recipe_lines()}
    assert tuple(lines) == recipe_names()
    coco = lines["internvl2-2b-lora-coco"]
    assert (coco.model, coco.method, coco.gpus, coco.global_batch) == ("InternVL2-2B", "lora", 8, 512)
    assert (coco.lora_rank, coco.learning_rate, coco.zero_stage) == (128, 4e-5, 1)
    assert lines["internvl2-2b-full"].lora_rank == 0


def test_a_recipe_shows_where_it_comes_from() -> None:
    assert recipe_text("internvl2-2b-lora-coco").startswith("# Figures of upstream's internvl_chat/shell/internvl2.0/")
    assert model_facts("internvl2-2b-lora-coco")["trainable"] == "125,829,120 parameters"
    assert "not tested" in model_facts("internvl3-9b-full")["caveat"]


def test_an_unknown_recipe_is_named_with_a_hint() -> None:
    with pytest.raises(SpecError, match="did you mean 'internvl2-2b-lora'\\?"):
        recipe_text("internvl2-2b-lor")


def test_estimate_lines_add_up(setup: Setup) -> None:
    *lines, total = estimate_lines(setup)
    assert total.part == "total"
    for stage in range(3):
        assert sum(line.typical[stage] for line in lines) == total.typical[stage]
        assert sum(line.longest[stage] for line in lines) == total.longest[stage]
    assert total.typical[0] > total.typical[1] > total.typical[2]


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("80Gi", 80 * GIB),
        ("80GiB", 80 * GIB),
        ("80GB", 80 * BILLION),
        ("80G", 80 * BILLION),
        ("80gb", 80 * BILLION),
        ("1.5Ti", 1536 * GIB),
        ("40960Mi", 40 * GIB),
        ("85899345920", 80 * GIB),
        (" 24 GiB ", 24 * GIB),
    ],
)
def test_amounts_of_memory(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


def test_quantities_are_compared_across_units() -> None:
    ordered = ["1n", "100m", 1, "1k", "512Mi", "1e9", "1Gi", "1T", "1Ti", "not a quantity"]
    assert sorted(set(ordered), key=amount) == ordered


@pytest.mark.parametrize("text", ["", "0Gi", "-1Gi", "eighty", "80Gi/GPU", "80i", "80Xi", "9" * 5000])
def test_a_wrong_amount_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected an amount of memory such as 80Gi or 80GB"):
        parse_bytes(text)


def test_amounts_in_words() -> None:
    assert gib(int(61.25 * GIB)) == "61.2 GiB"
