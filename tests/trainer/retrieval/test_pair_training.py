"""Retrieval runs in the training loop: equal losses whatever the ranks and ZeRO stage, and a rate for each layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closeness import ADAMW, LOSS, assert_close, assert_each_close
from internvl_trainer.distributed import free_port
from safetensors.torch import load_file
from trainer.runs import environment, losses, pod_environment

SCENARIOS = Path(__file__).with_name("pair_scenarios.py")
RUNS = [f"{method}-zero{stage}" for method in ("full", "head", "lora") for stage in (1, 3)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pair_scenarios.py makes, in one process and then in two: folder/<world size>/<run>."""
    folder = tmp_path_factory.mktemp("pairs")
    for world_size in (1, 2):
        port = free_port()
        ranks = [
            subprocess.Popen(
                [sys.executable, str(SCENARIOS), str(folder)],
                env=environment(folder / f"rank-{rank}", **pod_environment(rank, world_size, port)),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            logs = [rank.communicate(timeout=600)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(log[-3000:] for log in logs)
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_train_as_one(folder: Path, run: str) -> None:
    """With the same global batch in one forward: contrast needs the features of all ranks."""
    assert_each_close(losses(folder / "2" / run), losses(folder / "1" / run), ADAMW)


def test_methods_learn_differently(folder: Path) -> None:
    """So that curves that agree are not curves of a model that stays as it is."""
    curves = [losses(folder / "2" / f"{method}-zero1") for method in ("full", "head", "lora")]
    assert_close([curve[1] for curve in curves], [curves[0][1]] * 3, LOSS)
    assert len({curve[6] for curve in curves}) == 3


@pytest.mark.parametrize("method", ["full", "head", "lora"])
def test_zero_stages_agree(folder: Path, method: str) -> None:
    assert_each_close(losses(folder / "2" / f"{method}-zero3"), losses(folder / "2" / f"{method}-zero1"), ADAMW)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_stopped_run_goes_on_with_the_same_losses(folder: Path, stage: int) -> None:
    assert losses(folder / "2" / f"resumed-zero{stage}") == losses(folder / "2" / f"full-zero{stage}")


def test_what_is_left_to_chance_is_the_same_after_a_stop(folder: Path) -> None:
    """Mined negatives and drop path, which the spec's settings switch on."""
    full, hard, dropping = (losses(folder / "2" / run) for run in ("full-zero3", "hard", "dropping"))
    assert len({full[1], hard[1], dropping[1]}) == 3
    assert losses(folder / "2" / "dropping-resumed") == dropping


# Distance below the heads in a model of 2 vision and 5 QLLaMA layers.
POWERS = {
    "vision_model.embeddings.patch_embedding.weight": 3,
    "vision_model.encoder.layers.0.mlp.fc1.weight": 2,
    "vision_model.encoder.layers.1.mlp.fc1.weight": 1,
    "clip_projector.cross_attn.v.weight": 0,
    "query_tokens": 6,
    "qllama.model.layers.0.mlp.up_proj.weight": 5,
    "qllama.model.layers.4.mlp.up_proj.weight": 1,
    "text_projection": 0,
}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_layer_moves_at_its_own_rate(folder: Path, ranks: int, stage: int) -> None:
    """AdamW's first step moves a weight by its learning rate; with one rate for all, all would move alike."""
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / f"{ranks}" / f"first-step-zero{stage}" / "stages/train/model/model.safetensors")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in POWERS}
    assert moved == pytest.approx({name: 1e-3 * 0.9**power for name, power in POWERS.items()}, rel=1e-2)


def test_head_changes_the_text_projection_alone(folder: Path) -> None:
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / "2" / "head-zero3" / "stages/train/model/model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"text_projection"}


def test_the_loss_on_held_out_pairs_does_not_depend_on_the_ranks(folder: Path) -> None:
    """Five pairs in batches of four: in two processes, one has a pair more than the other."""
    found = [
        json.loads((folder / f"{ranks}" / "held-out/stages/train/metrics.jsonl").read_text())["validation_loss"]
        for ranks in (1, 2)
    ]
    assert_close(found[1], found[0], LOSS)


def test_lora_exports_an_adapter_and_the_head_that_learns_with_it(folder: Path) -> None:
    adapter = folder / "2" / "lora-zero1" / "stages/train/adapter"
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "trained_weights.safetensors",
    }
