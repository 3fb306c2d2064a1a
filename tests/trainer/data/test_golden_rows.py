"""Every golden row through our data path is what upstream made of it."""

import numpy as np
import pytest
import torch
from golden import CASES, ROWS, arrays, checkpoint, pixels, sample, tokenizer_of
from internvl_trainer.data.tokenize import IGNORED
from internvl_trainer.model.chat_model import normalise_tiles

ALL_ROWS = [pytest.param(case, row, id=f"{case}-{row}") for case in CASES for row in range(len(ROWS))]
LOST_UPSTREAM = [("phi3/phi3-chat", row) for row in (1, 3, 4)]


@pytest.mark.parametrize(("case", "row"), ALL_ROWS)
def test_ids_labels_flags_and_pixels_equal_upstreams(case: str, row: int) -> None:
    made, golden = sample(case, row), arrays(case)
    np.testing.assert_array_equal(made.input_ids, golden[f"s{row}.input_ids"])
    np.testing.assert_array_equal(made.labels, golden[f"s{row}.labels"])
    np.testing.assert_array_equal(made.image_flags, golden[f"s{row}.image_flags"])
    np.testing.assert_array_equal(
        normalise_tiles(torch.from_numpy(made.tiles)).numpy(), pixels()[f"s{row}.pixel_values"]
    )


@pytest.mark.parametrize(("case", "row"), [param for param in ALL_ROWS if param.values not in LOST_UPSTREAM])
def test_default_labels_equal_upstreams_where_upstream_loses_nothing(case: str, row: int) -> None:
    made = sample(case, row, compat="default")
    np.testing.assert_array_equal(made.input_ids, arrays(case)[f"s{row}.input_ids"])
    np.testing.assert_array_equal(made.labels, arrays(case)[f"s{row}.labels"])


@pytest.mark.parametrize(("case", "row"), LOST_UPSTREAM)
def test_rows_that_upstream_loses_are_supervised_by_default(case: str, row: int) -> None:
    assert (sample(case, row).labels == IGNORED).all()
    made = sample(case, row, compat="default")
    tokenizer = tokenizer_of(checkpoint("phi3"))
    supervised = tokenizer.decode(made.labels[made.labels != IGNORED])
    answers = [turn["value"] for turn in ROWS[row]["conversations"] if turn["from"] == "gpt"]
    assert supervised.replace(" ", "") == "".join(f"{answer}<|end|>" for answer in answers).replace(" ", "")
