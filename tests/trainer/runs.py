"""Small runs over the golden checkpoints, and processes to train them in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig
from internvl_api.status import StageResult
from internvl_trainer.distributed import free_port

PROGRAM = (sys.executable, "-m", "internvl_trainer")
GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
STEPS = 10
CHECKPOINT_EVERY = 5


def make_config(output: str, base: str = "qwen2", workers: int = 1, **sections: Any) -> RunConfig:
    """A RunConfig of STEPS steps over the golden rows; `sections` are laid over those of the spec."""
    spec: dict[str, Any] = {
        "model": {"source": str(GOLDEN / "checkpoints" / base)},
        "data": {"train": {"golden": {"annotation": str(GOLDEN / "data" / "samples.jsonl")}}},
        "method": "full",
        "workers": workers,
        "lora": {"languageRank": 4},
        "image": {"maxDynamicPatch": 6, "videoFrames": 5},
        "training": {
            "globalBatchSize": 4,
            "maxSteps": STEPS,
            "epochs": 50,
            "learningRate": 3e-3,
            "precision": "fp32",
            "dataWorkers": 0,
            "maxSeqLength": 2048,
        },
        "checkpoint": {"everySteps": CHECKPOINT_EVERY},
        "output": output,
    }
    if "/" in base:
        spec["model"] = {"source": base}
    for name, value in sections.items():
        spec[name] = {**spec.get(name, {}), **value} if isinstance(value, dict) else value
    if spec["method"] != "lora":
        del spec["lora"]
    return resolve(parse_spec(spec), job="team/run", job_uid="uid-1")


def write_config(config: RunConfig, folder: Path) -> Path:
    """The configuration as run.yaml."""
    path = folder / "run.yaml"
    path.write_text(config.to_yaml(reveal=True), encoding="utf-8")
    return path


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """What a trainer process sees: nothing shared with other tests, one thread so that two ranks do not fight."""
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "INTERNVL_CACHE": str(folder / "cache"),
        "INTERNVL_METRICS_PORT": str(free_port()),
        "TMPDIR": str(folder / "scratch"),
        "HOME": str(folder / "scratch"),
        **variables,
    }


def pod_environment(rank: int, world_size: int, port: int, processes: int = 1) -> dict[str, str]:
    """The rendezvous that the operator writes."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "PET_NPROC_PER_NODE": str(processes),
    }


class Stage:
    """One `internvl-trainer` process, its output read as it comes."""

    def __init__(
        self, arguments: list[str], env: dict[str, str], result: Path, program: Sequence[str] = PROGRAM
    ) -> None:
        result.touch()
        self._result_path = result
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [*program, *arguments],
            env={**env, "INTERNVL_TERMINATION_LOG": str(result)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Until a line with `text` was printed; fails when the process ends without it."""
        with self._changed:
            seen = self._changed.wait_for(
                lambda: any(text in line for line in self.lines) or not self._reader.is_alive(), timeout
            )
        assert seen, f"no {text!r} in time in:\n{self.output}"
        assert text in self.output, f"ended without {text!r}:\n{self.output}"

    def stop(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, timeout: float = 180) -> int:
        """Its exit code."""
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code

    @property
    def output(self) -> str:
        """All it printed so far."""
        return "\n".join(self.lines)

    @property
    def result(self) -> StageResult:
        """Its termination message."""
        return StageResult.model_validate_json(self._result_path.read_text(encoding="utf-8"))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


@contextmanager
def started(
    arguments: list[str], env: dict[str, str], result: Path, program: Sequence[str] = PROGRAM
) -> Iterator[Stage]:
    """A Stage that does not outlive the block."""
    stage = Stage(arguments, env, result, program)
    try:
        yield stage
    finally:
        if stage.process.poll() is None:
            stage.process.kill()
            stage.process.wait()


def losses(output: str | Path, *, folder: str = "stages/train") -> dict[int, float]:
    """Step to loss, from a metrics.jsonl; a step that was recorded twice is an error."""
    rows = [json.loads(line) for line in (Path(output) / folder / "metrics.jsonl").read_text().splitlines()]
    result = {row["step"]: row["loss"] for row in rows}
    assert len(result) == len(rows), f"steps recorded twice: {[row['step'] for row in rows]}"
    return result
