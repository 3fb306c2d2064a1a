"""Outputs of runs, as their stages leave them, without running any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from internvl_api.pipeline import figures_stage
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts.fingerprint import fingerprint
from internvl_trainer.artifacts.manifest import commit, upload_files
from internvl_trainer.artifacts.storage import Storage
from trainer.contexts import store_of
from trainer.runs import GOLDEN, make_config

TASK = {"task": "caption", "annotation": str(GOLDEN / "data" / "samples.jsonl")}
BEFORE = {"CIDEr": 0.25, "BLEU_4": 0.125}
AFTER = {"CIDEr": 1.5, "BLEU_4": 0.0625}


class Output:
    """The output of one run; `sections` are laid over those of the spec."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.folder = folder
        self.config: RunConfig = make_config(str(folder / "out"), **sections)
        self.stages = store_of(self.config)
        self.storage: Storage = self.stages.storage

    def train(self, count: int = 80) -> Output:
        """The train stage is done."""
        files = {"metrics.jsonl": self._write("metrics.jsonl", steps(count))}
        self.stages.commit("train", self.stages.upload("train", files), kind="adapter", steps=count)
        return self

    def checkpoint(self, count: int) -> Output:
        """The newest checkpoint, with its journal."""
        folder = f"checkpoints/step-{count:08d}"
        files = {"journal/metrics.jsonl": self._write("journal.jsonl", steps(count))}
        commit(self.storage, folder, upload_files(self.storage, folder, files), fingerprint(self.config), step=count)
        return self

    def evaluate(
        self, figures: dict[str, float], rows: list[dict[str, Any]], *, task: str = "coco", baseline: bool = False
    ) -> Output:
        """An evaluation is done, and scored."""
        answering: Any = "baseline-evaluate" if baseline else "evaluate"
        stage = figures_stage(answering, self.config.evaluation)
        self.stages.commit(answering, [], evaluation={})
        name = f"predictions/{task}.jsonl"
        described = self.stages.upload(stage, {name: self._write(f"{stage}.jsonl", rows)})
        measured = {"baseline" if baseline else "final": {task: figures}}
        self.stages.commit(stage, described, evaluation=measured)
        return self

    def preflight(self, *findings: dict[str, Any], name: str = "golden") -> Output:
        """preflight.json; a stage that is done."""
        annotation = self.config.data.train["golden"].annotation
        dataset = {
            "name": name,
            "annotation": annotation,
            "rows": 6,
            "rowsInEpoch": 5,
            "badRows": 1,
            "sha256": "5a" * 32,
        }
        document = {
            "datasets": [dataset],
            "skippedLines": {},
            "findings": list(findings),
            "model": {"commit": "c0ffee"},
        }
        self.storage.write("stages/preflight/preflight.json", json.dumps(document).encode())
        self.stages.commit("preflight", [])
        return self

    def _write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path


def steps(count: int) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: a falling loss, validated every ten steps, a second attempt with more processes."""
    return [
        {
            "step": step,
            "epoch": step / 10,
            "loss": 4 / (1 + step / 20),
            "learning_rate": 1e-4,
            "gradient_norm": 1.0,
            "supervised_tokens": 50,
            "tokens": 1000,
            "places": 1100,
            "samples": 4,
            "step_seconds": 0.5,
            "data_wait_seconds": 0.05,
            "world_size": 1 if step <= 30 else 2,
            "attempt": 1 if step <= 30 else 3,
            **({"validation_loss": 5 / (1 + step / 20)} if step % 10 == 0 else {}),
        }
        for step in range(1, count + 1)
    ]


def prediction(number: int, text: str = "a photo", cider: float | None = None, **changes: Any) -> dict[str, Any]:
    """A row of a predictions file."""
    return {
        "id": number,
        "image": "images/photo.jpg",
        "question": "What is it?",
        "prediction": text,
        "references": ["a reference"],
        "scores": {} if cider is None else {"CIDEr": cider},
        **changes,
    }


def evaluated(folder: Path, *, baseline: bool = True, publish_if: str | None = None, **sections: Any) -> Output:
    """A LoRA run that was trained and evaluated, on twenty rows."""
    evaluation = {"tasks": {"coco": TASK}, "baseline": baseline, **({"publishIf": publish_if} if publish_if else {})}
    output = Output(folder, method="lora", evaluation=evaluation, **sections).preflight().train()
    if baseline:
        output.evaluate(BEFORE, [prediction(number, "before it", 0.25) for number in range(20)], baseline=True)
    return output.evaluate(AFTER, [prediction(number, "after it", 0.55 + number / 10) for number in range(20)])
