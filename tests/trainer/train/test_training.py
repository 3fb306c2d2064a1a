"""What training promises, seen from its record: equal losses whatever the ZeRO stage, world size or accidents."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import ADAMW, LOSS, assert_close, assert_each_close, distance
from golden import sample
from internvl_api.constants import ExitCode
from internvl_trainer.data.collate import collate
from internvl_trainer.data.sampler import GlobalOrder
from internvl_trainer.distributed import free_port
from internvl_trainer.model.adapter_files import load_adapter
from internvl_trainer.model.load import load_chat_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer.runs import (
    CHECKPOINT_EVERY,
    GOLDEN,
    STEPS,
    environment,
    losses,
    make_config,
    pod_environment,
    started,
    write_config,
)
from trainer.train.scenarios import LORA, PACKED, STOPPED_AFTER, VALIDATED

pytestmark = pytest.mark.slow

METRICS = "stages/train/metrics.jsonl"
SCENARIOS = Path(__file__).with_name("scenarios.py")
STAGES = [pytest.param(stage, id=f"zero{stage}") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that scenarios.py makes, in two processes."""
    folder = tmp_path_factory.mktemp("scenarios")
    command = [sys.executable, "-c", _LAUNCH, str(SCENARIOS), str(folder)]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


_LAUNCH = """
import sys
from internvl_trainer.distributed import Rendezvous, free_port
from internvl_trainer.cli.launcher import launch
sys.exit(launch([sys.executable, *sys.argv[1:]], Rendezvous("127.0.0.1", free_port(), 2, 0, 0, 2), None))
"""


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "outcomes.json").read_text())
    return result


def validation_losses(output: Path) -> dict[int, float]:
    """Step to the loss on data.validation, where it was taken."""
    rows = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_falls(folder: Path, method: str) -> None:
    curve = losses(folder / f"{method}-zero1")
    assert sorted(curve) == list(range(1, STEPS + 1))
    first, last = sum(curve[step] for step in (1, 2, 3)), sum(curve[step] for step in (8, 9, 10))
    assert last < first * (0.98 if method == "lora" else 0.85)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("stage", STAGES)
def test_zero_stages_have_the_same_losses(folder: Path, method: str, stage: int) -> None:
    one, other = losses(folder / f"{method}-zero1"), losses(folder / f"{method}-zero{stage}")
    assert_each_close(one, other, ADAMW)


def test_a_rank_with_text_only_was_among_them() -> None:
    rows = [json.loads(line) for line in (GOLDEN / "data" / "samples.jsonl").read_text().splitlines()]
    text_only = {number for number, row in enumerate(rows) if "image" not in row and "video" not in row}
    config = make_config("/unused", workers=2)
    order = GlobalOrder(len(rows), config.training.global_batch_size, config.training.seed)
    ranks = [chain(*order.windows(0, STEPS, rank=rank, world_size=2, micro_batch=1)) for rank in (0, 1)]
    pairs = [(one[0].row in text_only, other[0].row in text_only) for one, other in zip(*ranks, strict=True)]
    assert (True, False) in pairs
    assert (False, True) in pairs


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3", "bf16"])
def test_stopped_and_resumed_equals_undisturbed(folder: Path, outcomes: dict[str, Any], kind: str) -> None:
    stopped = outcomes[f"resumed-{kind}-first"]
    assert (stopped["outcome"], stopped["checkpoint"]["step"]) == ("resume", 4)
    assert losses(folder / f"full-{kind}") == losses(folder / f"resumed-{kind}")


def test_a_checkpoint_goes_from_zero_1_to_zero_3(folder: Path) -> None:
    assert_each_close(losses(folder / "lora-zero1"), losses(folder / "lora-stopped"), ADAMW)


@pytest.mark.parametrize("stage", STAGES)
def test_validation_leaves_the_training_curve_alone(folder: Path, stage: int) -> None:
    """Bit by bit, though dropout draws random numbers."""
    assert losses(folder / f"validated-zero{stage}") == losses(folder / f"lora-zero{stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_the_validation_loss_is_taken_when_due_and_falls(folder: Path, stage: int) -> None:
    curve = validation_losses(folder / f"validated-zero{stage}")
    assert list(curve) == [3, 6, 9, 10]
    assert curve[10] < curve[3]
    assert_each_close(curve, validation_losses(folder / "validated-zero1"), ADAMW)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_stopped_while_it_validates_has_the_same_validation_losses(
    folder: Path, outcomes: dict[str, Any], stage: int
) -> None:
    name = f"late-zero{stage}"
    first, second = outcomes[f"{name}-first"], outcomes[name]
    assert (first["outcome"], first["checkpoint"]["step"]) == ("resume", 3)
    assert "validationLoss" not in first["progress"], "it was asked to stop in the middle of the first"
    assert validation_losses(folder / name) == validation_losses(folder / f"validated-zero{stage}")
    assert losses(folder / name) == losses(folder / f"validated-zero{stage}")
    last = validation_losses(folder / name)[10]
    assert second["progress"]["validationLoss"] == last
    assert f'internvl_train_validation_loss{{job_name="run",job_namespace="team"}} {last}' in second["metrics"]
    events = EventAccumulator(str(folder / name / "stages/train/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/loss")] == [3, 6, 9, 10]


def test_the_last_validation_loss_is_that_of_the_trained_model(folder: Path) -> None:
    """Row by row, with what the run left: the first five golden rows, and no dropout."""
    run = folder / "validated-zero1"
    model = load_chat_model(GOLDEN / "checkpoints" / "internlm2", dtype=torch.float32).model
    adapter = run / "stages/train/adapter"
    load_adapter(model, adapter)
    model.native.load_state_dict(load_file(adapter / "trained_weights.safetensors"), strict=False)
    model.eval()
    template = json.loads((GOLDEN / "checkpoints/internlm2/config.json").read_text())["template"]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in range(5):
            drawn = sample(f"internlm2/{template}", row, compat="default", max_length=2048)
            output = model(**collate([drawn]))
            total, tokens = total + float(output.loss_sum), tokens + int(output.tokens)
    assert_close(validation_losses(run)[10], total / tokens, LOSS)


def test_validation_is_the_same_on_one_rank(folder: Path, tmp_path: Path) -> None:
    config = write_config(make_config(str(tmp_path / "out"), "internlm2", **LORA, **VALIDATED), tmp_path)
    env = environment(tmp_path)
    with started(["train", "--config", str(config)], env, tmp_path / "result") as alone:
        alone.wait_for("step 9 validation loss")
        assert alone.wait() == ExitCode.OK, alone.output
    mine, theirs = validation_losses(tmp_path / "out"), validation_losses(folder / "validated-zero1")
    assert_each_close(mine, theirs, ADAMW)
    assert_each_close(losses(tmp_path / "out"), losses(folder / "validated-zero1"), ADAMW)


def test_final_weights_are_those_of_the_undisturbed_run(folder: Path) -> None:
    file = "stages/train/model/model.safetensors"
    one, other = load_file(folder / "full-zero3" / file), load_file(folder / "resumed-zero3" / file)
    assert sorted(one) == sorted(other)
    assert all((one[name] == other[name]).all() for name in one)


def test_the_adapter_and_what_learned_beside_it_go_back_on_the_base(folder: Path) -> None:
    model = load_chat_model(GOLDEN / "checkpoints" / "internlm2", dtype=torch.float32).model
    for stage in (1, 3):
        adapter = load_file(folder / f"lora-zero{stage}" / "stages/train/adapter/adapter_model.safetensors")
        assert max(float(tensor.abs().max()) for name, tensor in adapter.items() if "lora_B" in name) > 1e-4
    load_adapter(model, folder / "lora-zero3" / "stages/train/adapter")
    others = load_file(folder / "lora-zero3" / "stages/train/adapter/trained_weights.safetensors")
    assert others
    assert all("multi_modal_projector" in name for name in others)
    assert not model.native.load_state_dict(others, strict=False).unexpected_keys


def test_a_native_checkpoint_trains_alike_and_comes_out_native(folder: Path) -> None:
    curve, reference = losses(folder / "native-base"), losses(folder / "full-zero1")
    assert_close(curve[1], reference[1], LOSS)
    exported = folder / "native-base" / "stages/train/model"
    trained = load_chat_model(exported, dtype=torch.float32).model
    assert json.loads((exported / "config.json").read_text())["model_type"] == "internvl"
    before = load_chat_model(folder / "native", dtype=torch.float32).model
    assert not torch.equal(trained.native.lm_head.weight, before.native.lm_head.weight)


def test_a_broken_checkpoint_is_passed_over(folder: Path, outcomes: dict[str, Any]) -> None:
    assert outcomes["broken-newest-first"]["checkpoint"]["step"] == 7
    assert outcomes["broken-newest"]["outcome"] == "succeeded"
    assert losses(folder / "full-zero1") == losses(folder / "broken-newest")


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_without_a_whole_checkpoint_training_begins_with_the_base_model(
    folder: Path, outcomes: dict[str, Any], kind: str
) -> None:
    """Although the weights that learn were not read from it when the model was loaded."""
    assert outcomes[f"all-broken-{kind}-first"]["checkpoint"]["step"] == STOPPED_AFTER
    assert losses(folder / f"full-{kind}") == losses(folder / f"all-broken-{kind}")


def test_only_the_newest_checkpoints_are_kept(folder: Path) -> None:
    kept = sorted(path.name for path in (folder / "full-zero1" / "checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000010"]  # checkpoint.keep is 2
    again = sorted(path.name for path in (folder / "resumed-zero1" / "checkpoints").iterdir())
    assert again == ["step-00000005", "step-00000010"]  # the one of the stop, step 4, is gone


def test_checkpoints_hold_safetensors_and_no_frozen_weight(folder: Path) -> None:
    files = [path for path in (folder / "lora-zero1" / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files if "tensorboard" not in path.parts} == {".safetensors", ".json", ".jsonl"}
    names = {name for path in files if path.suffix == ".safetensors" for name in load_file(path)}
    assert names
    assert not [name for name in names if ".lora_" not in name and "multi_modal_projector" not in name]
    shared = [name for name in names if "layers.0.self_attn" in name and "language" in name and "lora_A" in name]
    assert not [name for name in shared if "k_proj" in name or "v_proj" in name]  # one A for q, k and v


def test_packed_and_stopped_on_two_ranks_equals_undisturbed_on_one(folder: Path, tmp_path: Path) -> None:
    config = write_config(make_config(str(tmp_path / "out"), training=PACKED), tmp_path)
    for stage in ("preflight", "train"):
        with started([stage, "--config", str(config)], environment(tmp_path), tmp_path / stage) as alone:
            assert alone.wait() == ExitCode.OK, alone.output
    assert_each_close(losses(folder / "packed-again"), losses(tmp_path / "out"), ADAMW)
    mine, theirs = ((each / METRICS).read_text().splitlines() for each in (tmp_path / "out", folder / "packed-again"))
    for one, other in zip(mine, theirs, strict=True):
        for figure in ("samples", "tokens", "supervised_tokens", "epoch"):
            assert json.loads(one)[figure] == json.loads(other)[figure]
    last = json.loads(mine[-1])
    assert last["places"] == last["tokens"], "one pack a forward has no padding"
    assert last["samples"] > 4, "more rows than packs"


def test_more_packs_a_forward_change_nothing(folder: Path) -> None:
    assert_each_close(losses(folder / "packed-again"), losses(folder / "packed-two-a-forward"), ADAMW)
    record = json.loads((folder / "packed-two-a-forward" / METRICS).read_text().splitlines()[0])
    assert record["places"] == record["tokens"], "two packs are one sequence, without padding"


@pytest.mark.parametrize("stage", STAGES)
def test_a_maximum_of_tokens_changes_nothing(folder: Path, outcomes: dict[str, Any], stage: int) -> None:
    """Steps have one or two forwards on each rank then; the run under ZeRO-1 was stopped and resumed too."""
    name = f"limited-zero{stage}"
    assert outcomes["limited-zero1-first"]["outcome"] == "resume"
    assert outcomes[name]["outcome"] == "succeeded"
    assert_each_close(losses(folder / name), losses(folder / f"full-zero{stage}"), ADAMW)


def test_a_maximum_of_tokens_asks_for_the_preflight(outcomes: dict[str, Any]) -> None:
    assert outcomes["limited-without-preflight"]["reason"] == "PreflightMissing"
    assert "spec.training.maxTokensPerMicroBatch" in outcomes["limited-without-preflight"]["message"]


def test_packing_asks_for_the_preflight(outcomes: dict[str, Any]) -> None:
    assert outcomes["packed-without-preflight"]["reason"] == "PreflightMissing"


def test_compat_upstream_takes_the_mean_of_means(folder: Path) -> None:
    record = json.loads((folder / "upstream-loss" / "stages/train/metrics.jsonl").read_text())
    ours = json.loads((folder / "full-zero1" / "stages/train/metrics.jsonl").read_text().splitlines()[0])
    assert distance(record["gradient_norm"], ours["gradient_norm"]) > 0.1, "more than rounding"


def test_a_loss_that_is_no_number_stops_before_the_weights(outcomes: dict[str, Any], folder: Path) -> None:
    assert outcomes["not-finite"]["reason"] == "LossNotFinite"
    assert "at step 1; the weights were not touched and there is no checkpoint yet" in outcomes["not-finite"]["message"]
    assert not (folder / "not-finite" / "checkpoints").exists()


def test_killed_pod_fails_its_peer_and_both_resume_exactly(folder: Path, tmp_path: Path) -> None:
    config = write_config(make_config(str(tmp_path / "out"), workers=2, training={"dataWorkers": 1}), tmp_path)
    port = free_port()
    pods = [environment(tmp_path, **pod_environment(rank, 2, port)) for rank in (0, 1)]
    arguments = ["train", "--config", str(config)]
    with (
        started(arguments, pods[0], tmp_path / "result-0") as first,
        started(arguments, pods[1], tmp_path / "result-1") as second,
    ):
        first.wait_for(f"checkpoint at step {CHECKPOINT_EVERY} is complete")
        second.stop(signal.SIGKILL)
        assert second.wait() == -signal.SIGKILL
        assert first.wait(60) == ExitCode.INTERNAL
        assert first.result.reason == "PeerLost"
    both = environment(tmp_path, **pod_environment(0, 2, free_port(), processes=2))
    with started(arguments, both, tmp_path / "result") as again:
        assert again.wait() == ExitCode.OK, again.output
    assert f"step {CHECKPOINT_EVERY}/" not in again.output
    assert losses(folder / "full-zero1") == losses(tmp_path / "out")


def test_sigterm_saves_and_another_world_size_goes_on(folder: Path, tmp_path: Path) -> None:
    config = write_config(make_config(str(tmp_path / "out"), workers=2), tmp_path)
    arguments = ["train", "--config", str(config)]
    with started(arguments, environment(tmp_path, **pod_environment(0, 1, free_port())), tmp_path / "one") as alone:
        alone.wait_for("step 2/10")
        alone.stop(signal.SIGTERM)
        assert alone.wait() == ExitCode.RESUME, alone.output
        stopped = alone.result
    assert stopped.outcome == "resume"
    assert stopped.checkpoint is not None
    assert 2 <= stopped.checkpoint.step < STEPS
    assert (Path(stopped.checkpoint.uri) / "manifest.json").is_file()
    both = environment(tmp_path, **pod_environment(0, 2, free_port(), processes=2))
    with started(arguments, both, tmp_path / "two") as two:
        assert two.wait() == ExitCode.OK, two.output
    assert f"step {stopped.checkpoint.step + 1}/" in two.output
    assert f"step {stopped.checkpoint.step}/" not in two.output
    assert_each_close(losses(folder / "full-zero1"), losses(tmp_path / "out"), ADAMW)


def test_two_ranks_checkpoint_goes_on_with_one(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(folder / "from-two-to-one", output)
    run = json.loads((output / "run.json").read_text())
    assert run["job"] == "team/run"
    config = write_config(make_config(str(output)), tmp_path)
    with started(["train", "--config", str(config)], environment(tmp_path), tmp_path / "result") as alone:
        assert alone.wait() == ExitCode.OK, alone.output
    assert "step 4/" not in alone.output
    assert_each_close(losses(folder / "full-zero1"), losses(output), ADAMW)
