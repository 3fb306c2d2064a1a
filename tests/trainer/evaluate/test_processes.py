"""Evaluation as the operator starts it: several processes, killed ones, and the same figures every time."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from internvl_api.constants import ExitCode
from internvl_api.run_config import RunConfig
from internvl_trainer.distributed import free_port
from trainer.evaluations import evaluation_config, predictions, write_vqa
from trainer.runs import Stage, environment, pod_environment, started, write_config

pytestmark = pytest.mark.slow

ROWS = 150  # five chunks
STAGE = "baseline-evaluate"


def run_config(folder: Path) -> RunConfig:
    """A LoRA run with questions in five chunks, and a condition that no model meets."""
    tasks = {"colours": {"task": "vqa", "annotation": str(write_vqa(folder, ROWS)), "maxNewTokens": 16}}
    training = {"maxSteps": 3, "learningRate": 0.05}
    evaluation = {"publishIf": "vqa_accuracy > baseline.vqa_accuracy + 1"}
    return evaluation_config(folder, tasks, method="lora", training=training, evaluation=evaluation)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained; nothing is evaluated yet."""
    folder = tmp_path_factory.mktemp("run")
    write_config(run_config(folder), folder)
    with stage(folder, "train") as training:
        assert training.wait() == ExitCode.OK, training.output
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same run, its base model evaluated by one undisturbed process."""
    with stage(folder, STAGE) as evaluation:
        assert evaluation.wait() == ExitCode.OK, evaluation.output
    return folder


@contextmanager
def stage(folder: Path, name: str, processes: int = 1) -> Iterator[Stage]:
    """A stage in one pod of so many processes."""
    env = environment(folder, **pod_environment(0, processes, free_port(), processes))
    arguments = [name, "--config", str(folder / "run.yaml")]
    with started(arguments, env, folder / f"result-{name}") as running:
        yield running


def moved(folder: Path, target: Path) -> Path:
    """The same run with another output, which holds only what was trained."""
    text = (folder / "run.yaml").read_text().replace(f"{folder}/output", f"{target}/output")
    (target / "run.yaml").write_text(text)
    shutil.copytree(folder / "output/stages/train", target / "output/stages/train")
    shutil.copyfile(folder / "output/run.json", target / "output/run.json")
    return target


def results(folder: Path, name: str = STAGE) -> dict[str, bytes]:
    """Every file of the result but the manifest."""
    root = folder / "output/stages" / name
    files = [path for path in root.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_two_processes_of_a_pod_give_what_one_gives(alone: Path, tmp_path: Path) -> None:
    with stage(moved(alone, tmp_path), STAGE, processes=2) as evaluation:
        assert evaluation.wait() == ExitCode.OK, evaluation.output
    assert sorted(results(tmp_path)) == ["predictions/colours.jsonl", "scores.json"]
    assert results(tmp_path) == results(alone)


def test_a_killed_evaluation_goes_on_in_another_group(alone: Path, tmp_path: Path) -> None:
    """Two pods of one process after one pod; what was stored is not answered again."""
    moved(alone, tmp_path)
    with stage(tmp_path, STAGE) as killed:
        killed.wait_for(f"answered 64 of {ROWS} rows")
        killed.stop(signal.SIGKILL)
        killed.wait()
    chunks = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("chunks/**/*.jsonl")}
    assert 2 <= len(chunks) < 5
    port = free_port()
    with ExitStack() as stack:
        pods = [
            stack.enter_context(
                started(
                    [STAGE, "--config", str(tmp_path / "run.yaml")],
                    environment(tmp_path / f"pod-{rank}", **pod_environment(rank, 2, port)),
                    tmp_path / f"result-{rank}",
                )
            )
            for rank in (0, 1)
        ]
        assert [pod.wait() for pod in pods] == [ExitCode.OK, ExitCode.OK], pods[0].output
    assert f"{5 - len(chunks)} chunks to answer" in pods[0].output
    assert results(tmp_path) == results(alone)


def test_the_trained_model_is_refused_with_its_figures(alone: Path) -> None:
    """Both processes leave with the refusal, and only after the report is written."""
    with stage(alone, "evaluate", processes=2) as evaluation:
        assert evaluation.wait() == ExitCode.REJECTED, evaluation.output
    result = evaluation.result
    assert (result.outcome, result.reason) == ("failed", "EvaluationBelowThreshold")
    assert re.search(r"vqa_accuracy = \d\.\d{4}, baseline\.vqa_accuracy = \d\.\d{4}; publishIf", result.message)
    assert result.evaluation is not None
    assert result.evaluation.final == json.loads(results(alone, "evaluate")["scores.json"])
    assert result.evaluation.baseline == json.loads(results(alone)["scores.json"])
    assert Path(result.artifacts["report"]).is_file()
    assert Path(result.artifacts["adapter"], "adapter_model.safetensors").is_file()
    before, after = (predictions(alone, name, "colours") for name in (STAGE, "evaluate"))
    assert [row["prediction"] for row in before] != [row["prediction"] for row in after]
