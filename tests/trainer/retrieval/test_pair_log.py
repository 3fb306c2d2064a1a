"""What a user reads in the log before the first step: what learns, and how fast."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from internvl_trainer.distributed import Group
from internvl_trainer.model.checkpoint_format.files import list_tensors
from internvl_trainer.retrieval.methods import HEAD
from internvl_trainer.stages.preflight import run as preflight
from internvl_trainer.train.base_model import BaseModel
from internvl_trainer.train.retrieval import retrieval_components
from trainer.contexts import context_of, group_context
from trainer.retrieval.pair_runs import pair_config


def said(folder: Path, method: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the log until training may begin."""
    config = pair_config(folder, str(folder / "out"), method=method)
    preflight(context_of(config, "preflight"))
    caplog.set_level(logging.INFO)
    caplog.clear()
    alone = Group(0, 1, 0, torch.device("cpu"), control=None)
    model = folder / "model"
    base = BaseModel(config, model, list_tensors(model), resumes=False)
    retrieval_components(group_context(config, "train", alone), base)
    return caplog.text.splitlines()


def test_head_lists_its_parameters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (listed,) = [line for line in said(tmp_path, "head", caplog) if "these parameters learn: " in line]
    assert set(listed.split("learn: ")[1].split(", ")) == set(HEAD)


def test_full_says_the_rate_of_each_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """0.9 to the power of the distance below the heads, of 1e-3, in 2 vision and 5 QLLaMA layers."""
    words = [" ".join(line.split()[:4]) for line in said(tmp_path, "full", caplog)]
    for place, power in (("vision/layer 0", 2), ("vision/layer 1", 1), ("qllama/layer 0", 5), ("qllama/layer 4", 1)):
        assert f"{place} lr {1e-3 * 0.9**power:.4e}" in words
