"""The metrics of every step: metrics.jsonl (full precision) and TensorBoard events.

Both live in one folder that goes into every checkpoint. A resumed run starts from the checkpoint's copy, which ends at
the checkpoint's step, so no step is ever recorded twice.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from internvl_api.constants import ENV_ATTEMPT

from internvl_trainer.artifacts.output_layout import EVENTS_FOLDER, JOURNAL, METRICS_FILE, SAMPLES_FILE, SAMPLES_FOLDER
from internvl_trainer.distributed import Group

VALIDATION_SCALAR = "validation/loss"
"""The loss on data.validation in TensorBoard and in trackers."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    `step` counts from 1; `loss` is the (weighted) mean over supervised tokens; `places` are the positions computed,
    `tokens` and padding; times are in seconds. `validation_loss` is that of the weights after this step, in the steps
    after which it was taken. `dataset_losses` and `validation_losses` are those of each dataset, where there are
    several, without loss weights. `warning` is LossWatch's finding in this step; `ended_early` is why no step follows
    although some were planned. `bandwidth`, in an attempt's first step, has its measurements in bytes per second.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    supervised_tokens: int
    tokens: int
    places: int
    samples: int
    step_seconds: float
    data_wait_seconds: float
    world_size: int
    validation_loss: float | None = None
    dataset_losses: dict[str, float] | None = None
    validation_losses: dict[str, float] | None = None
    warning: str | None = None
    ended_early: str | None = None
    bandwidth: dict[str, float] | None = None

    @property
    def samples_per_second(self) -> float:
        """Rows of the data."""
        return self.samples / self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        """Without padding."""
        return self.tokens / self.step_seconds

    def scalars(self) -> dict[str, float]:
        """The step's figures under the names of TensorBoard and of trackers."""
        found = {
            "train/loss": self.loss,
            "train/learning_rate": self.learning_rate,
            "train/gradient_norm": self.gradient_norm,
            "train/step_seconds": self.step_seconds,
            "train/data_wait_seconds": self.data_wait_seconds,
            "train/tokens_per_second": self.tokens_per_second,
            "train/packing_efficiency": self.tokens / self.places,
        }
        for prefix, figures in (
            ("train/loss", self.dataset_losses),
            (VALIDATION_SCALAR, self.validation_losses),
            ("bandwidth", self.bandwidth),
        ):
            found |= {f"{prefix}/{name}": value for name, value in (figures or {}).items()}
        return found if self.validation_loss is None else {**found, VALIDATION_SCALAR: self.validation_loss}


class MetricsLog:
    """Appends to the files in `folder`. Each row of metrics.jsonl names the attempt that took the step."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and only rank 0 needs it

        self.folder = folder
        (folder / EVENTS_FOLDER).mkdir(parents=True, exist_ok=True)
        self._attempt = count_attempts(folder / METRICS_FILE)
        self._metrics = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / EVENTS_FOLDER), flush_secs=30)

    def record(self, step: StepRecord) -> None:
        """Add one step."""
        known = {name: value for name, value in asdict(step).items() if value is not None}
        self._metrics.write(json.dumps({**known, "attempt": self._attempt}) + "\n")
        for name, value in step.scalars().items():
            self._events.add_scalar(name, value, step.step)

    @property
    def is_validated(self) -> bool:
        """Whether the last step's row has a validation loss."""
        return "validation_loss" in self.rows()[-1]

    def add_validation(
        self, loss: float, by_dataset: dict[str, float] | None = None, ended_early: str | None = None
    ) -> None:
        """Add to the last step's row: the held-out loss, the loss of each dataset, and why training ends early."""
        *earlier, last = self.rows()
        self._metrics.close()
        path = self.folder / METRICS_FILE
        known = {"validation_loss": loss, "validation_losses": by_dataset, "ended_early": ended_early}
        found = {name: value for name, value in known.items() if value is not None}
        lines = [json.dumps(row) + "\n" for row in [*earlier, {**last, **found}]]
        path.write_text("".join(lines), encoding="utf-8")
        self._metrics = path.open("a", encoding="utf-8")
        self._events.add_scalar(VALIDATION_SCALAR, loss, last["step"])

    def add_samples(self, step: int, answers: Sequence[Mapping[str, Any]], pictures: Mapping[int, bytes]) -> None:
        """Add the answers to sample rows after `step` steps (`Answered` as JSON).

        Args:
            pictures: row to JPEG, of rows that have none in the log yet.
        """
        from PIL import Image

        with (self.folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "answers": list(answers)}) + "\n")
        for row, data in pictures.items():
            path = self.folder / SAMPLES_FOLDER / f"{row}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            self._events.add_image(f"samples/{row}", picture, step, dataformats="HWC")
        for each in answers:
            self._events.add_text(f"samples/{each['row']}", _sample_text(each), step)

    @property
    def has_samples(self) -> bool:
        """Whether there are answers of an earlier step, and their pictures."""
        return (self.folder / SAMPLES_FILE).exists()

    def validations(self) -> list[tuple[int, float]]:
        """(step, loss on held-out rows) of the steps after which it was taken."""
        return [(row["step"], row["validation_loss"]) for row in self.rows() if "validation_loss" in row]

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far."""
        self._metrics.flush()
        lines = (self.folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def files(self) -> dict[str, Path]:
        """Relative name to path of the flushed files."""
        self._metrics.flush()
        self._events.flush()
        return {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._events.close()


def _sample_text(answered: Mapping[str, Any]) -> str:
    """Markdown, in which each line of the row and of the answer is code, so that nothing in it is markup."""
    found = answered["answer"] if answered["problem"] is None else f"no answer: {answered['problem']}"
    parts = (("question", answered["question"]), ("answer", found), ("reference", answered["reference"]))
    return "\n\n".join(f"{name}:\n\n{_as_code(text)}" for name, text in parts)


def _as_code(text: str) -> str:
    return "\n".join(f"    {line}" for line in (text or "(empty)").splitlines())


def count_attempts(metrics: Path) -> int:
    """The number of this attempt: the operator's, else one more than the last row's."""
    if said := os.environ.get(ENV_ATTEMPT):
        return int(said)
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1]).get("attempt", 1)) + 1 if lines else 1


def open_metrics_log(scratch: Path, group: Group) -> MetricsLog | None:
    """Rank 0's metrics log, continuing that of the restored checkpoint; None on the other ranks."""
    if not group.leads:
        return None
    restore_metrics_log(scratch / "record", scratch / JOURNAL)
    return MetricsLog(scratch / "record")


def restore_metrics_log(folder: Path, saved: Path) -> None:
    """Replace `folder` with the checkpoint's copy, if there is one."""
    shutil.rmtree(folder, ignore_errors=True)
    if saved.is_dir():
        shutil.copytree(saved, folder)
