"""A run that overfits on purpose ends early and publishes the step with the lowest loss on held-out rows."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from closeness import ADAMW, assert_each_close
from internvl_api.constants import ExitCode
from internvl_api.run_config import RunConfig
from internvl_trainer.distributed import free_port
from internvl_trainer.model.load import load_chat_model
from internvl_trainer.stages.publish import run as publish
from safetensors.torch import load_file
from trainer.contexts import context_of
from trainer.runs import environment, losses, make_config, pod_environment, started, write_config

pytestmark = pytest.mark.slow

EVERY, PATIENCE, CHECKPOINT_EVERY = 2, 2, 5
STEPS = 40


def row(number: int, answer: str) -> str:
    turns = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": number, "conversations": turns}) + "\n"


class Ended(NamedTuple):
    """The files and the outcome of a finished run."""

    config: RunConfig
    output: Path
    result: Any

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "stages/train/manifest.json").read_text())
        return found

    @property
    def validation(self) -> dict[int, float]:
        """Step to loss on the held-out row."""
        lines = (self.output / "stages/train/metrics.jsonl").read_text().splitlines()
        return {each["step"]: each["validation_loss"] for each in map(json.loads, lines) if "validation_loss" in each}

    @property
    def samples(self) -> list[tuple[int, Any]]:
        """Step and answers of each round; there is one held-out row."""
        lines = (self.output / "stages/train/samples.jsonl").read_text().splitlines()
        return [(each["step"], each["answers"]) for each in map(json.loads, lines)]

    @property
    def kept(self) -> list[int]:
        """The steps of the checkpoints."""
        return sorted(int(path.name[5:13]) for path in (self.output / "checkpoints").iterdir())

    @property
    def best(self) -> int:
        return min(self.validation, key=lambda step: (self.validation[step], step))


def overfitting(folder: Path, **sections: Any) -> RunConfig:
    """Four rows with one answer, and a held-out row with another: its loss falls first, and rises soon."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(row(number, "red blue red blue green") for number in range(4)))
    (folder / "held.jsonl").write_text(row(9, "blue green blue red red"))
    data = {
        "train": {"golden": {"annotation": str(folder / "train.jsonl")}},
        "validation": {"held": {"annotation": str(folder / "held.jsonl")}},
    }
    training = {
        "maxSteps": STEPS,
        "lrSchedule": "constant",
        "warmupRatio": 0.0,
        "learningRate": 5e-3,
        "earlyStopping": {"patience": PATIENCE},
        "samples": {"everySteps": 6, "rows": 2, "maxNewTokens": 4},
    }
    if sections.get("training", {}).get("zeroStage") == 3:
        del training["samples"]
    return make_config(
        str(folder / "out"),
        data=data,
        evaluation={"everySteps": EVERY},
        checkpoint={"everySteps": CHECKPOINT_EVERY, "keep": 1, "keepBest": True},
        training={**training, **sections.pop("training", {})},
        **sections,
    )


def ended(config: RunConfig, folder: Path, result: Any) -> Ended:
    return Ended(config, folder / "out", result)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """In one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = overfitting(folder)
    with started(["train", "--config", str(write_config(config, folder))], environment(folder), folder / "r") as run:
        assert run.wait(500) == ExitCode.OK, run.output
        return ended(config, folder, run.result)


def test_it_ends_early_and_says_why(undisturbed: Ended) -> None:
    curve = list(undisturbed.validation.items())
    assert undisturbed.best == curve[-1 - PATIENCE][0], "the losses after it are higher"
    last = curve[-1][0]
    assert last < STEPS
    assert sorted(losses(undisturbed.output)) == list(range(1, last + 1))
    result = undisturbed.result
    assert result.reason == "EarlyStopped"
    assert f"ended after step {last}: none of the last {PATIENCE} losses" in result.message
    assert f"exports the weights of step {undisturbed.best}, whose loss on data.validation is" in result.message
    progress = result.progress
    assert (progress.best_step, progress.exported_step) == (undisturbed.best, undisturbed.best)
    assert progress.best_validation_loss == undisturbed.validation[undisturbed.best]
    assert progress.ended_early in result.message
    assert undisturbed.manifest["steps"] == last
    assert undisturbed.manifest["exported"]["step"] == undisturbed.best
    assert undisturbed.manifest["endedEarly"] == progress.ended_early


def test_the_held_out_row_is_answered_when_due_and_at_the_end(undisturbed: Ended) -> None:
    last = max(undisturbed.validation)
    assert [step for step, _ in undisturbed.samples] == sorted({*range(0, last, 6), last})
    for _, (answered,) in undisturbed.samples:
        assert (answered["question"], answered["reference"]) == ("What is 9?", "blue green blue red red")
        assert answered["problem"] is None
    assert len({answered["answer"] for _, (answered,) in undisturbed.samples}) > 1, "training changes them"


def test_the_best_and_the_last_checkpoint_are_kept(undisturbed: Ended) -> None:
    assert undisturbed.kept == [undisturbed.best, max(undisturbed.validation)]


def stored_weights(run: Ended, step: int) -> dict[str, torch.Tensor]:
    """The flattened parameters in the checkpoint of a step."""
    (folder,) = (run.output / "checkpoints").glob(f"step-{step:08d}*")
    manifest = json.loads((folder / "manifest.json").read_text())
    whole = {name: torch.empty(torch.Size(shape).numel()) for name, shape in manifest["shapes"].items()}
    for file, ranges in manifest["layout"].items():
        tensors = load_file(folder / file)
        for name, (start, length) in ranges.items():
            whole[name][start : start + length] = tensors[f"weight/{name}"]
    return whole


def assert_exports(run: Ended, step: int, other: int) -> None:
    """The exported tensors are those of a step's checkpoint, bit by bit, and not those of another's."""
    model = load_chat_model(run.output / "stages/train/model", dtype=torch.float32).model
    exported = {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}
    for each, is_it in ((step, True), (other, False)):
        wanted = stored_weights(run, each)
        assert wanted
        assert all(torch.equal(exported[name], values) for name, values in wanted.items()) is is_it, f"step {each}"


def test_the_weights_of_the_best_step_are_exported(undisturbed: Ended) -> None:
    assert_exports(undisturbed, undisturbed.best, max(undisturbed.validation))


def test_killed_and_resumed_it_publishes_the_same_step(undisturbed: Ended, tmp_path: Path) -> None:
    """Killed after a validation that no checkpoint holds; resumed by two ranks under ZeRO-3."""
    alone = overfitting(tmp_path)
    last = max(undisturbed.validation)
    env = environment(tmp_path)
    with started(["train", "--config", str(write_config(alone, tmp_path))], env, tmp_path / "one") as run:
        run.wait_for(f"step {last - EVERY} validation loss", 500)
        run.stop(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    both = overfitting(tmp_path, training={"zeroStage": 3})
    env = environment(tmp_path, **pod_environment(0, 2, free_port(), processes=2))
    with started(["train", "--config", str(write_config(both, tmp_path))], env, tmp_path / "two") as run:
        assert run.wait(500) == ExitCode.OK, run.output
        killed = ended(both, tmp_path, run.result)
    assert_each_close(killed.validation, undisturbed.validation, ADAMW)
    assert killed.manifest["steps"] == last
    assert killed.manifest["exported"]["step"] == undisturbed.best
    assert_exports(killed, undisturbed.best, last)
    published = publish(context_of(both, "publish"))
    assert f"exports the weights of step {undisturbed.best}" in published.message
    artifacts = killed.output / "artifacts"
    assert json.loads((artifacts / "manifest.json").read_text())["exported"]["step"] == undisturbed.best
    assert f"exports the weights of step {undisturbed.best}" in (artifacts / "README.md").read_text()
    assert f"exports the weights of step {undisturbed.best}" in (artifacts / "report/index.html").read_text()
    assert killed.kept == [undisturbed.best, last]
