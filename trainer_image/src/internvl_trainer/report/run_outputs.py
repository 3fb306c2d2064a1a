"""The results of finished runs, read from their outputs alone, to compare them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar

import yaml
from internvl_api.pipeline import SCORED_BY
from internvl_api.status import EvaluationStatus, StageName

from internvl_trainer.artifacts.manifest import MANIFEST, ManifestError, read_manifest
from internvl_trainer.artifacts.output_layout import (
    ARTIFACTS,
    EVALUATION,
    METRICS_FILE,
    PREDICTIONS,
    RUN_CONFIG,
    RUN_FILE,
)
from internvl_trainer.artifacts.storage import Storage, open_storage
from internvl_trainer.errors import UserError
from internvl_trainer.report.comparison import Comparisons, compare_figures
from internvl_trainer.report.record import Row, read_lines
from internvl_trainer.stage_store import stage_key

_MOST_SETTINGS, _DEEPEST, _LONGEST = 2000, 12, 200  # leaves of a run.yaml, levels, characters of a value or name
_NOT_SETTINGS = ("job", "jobUid", "output")  # shown on their own
Result = TypeVar("Result")


@dataclass(frozen=True)
class RunResults:
    """The results of one run, as its output has them. A result that is missing there is empty or None.

    Attributes:
        settings: path to value, as in run.yaml; of a run that published nothing only those that decide the loss.
        steps: rows of metrics.jsonl with a number in each column that the page reads.
        device: the name of a GPU, or CPU.
    """

    uri: str
    job: str = "–"
    settings: dict[str, str] = field(default_factory=dict)
    steps: list[Row] = field(default_factory=list)
    compared: Comparisons = field(default_factory=dict)
    published: datetime | None = None
    device: str | None = None
    peak_gpu_bytes: int | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds in steps."""
        return sum(row["step_seconds"] for row in self.steps) if self.steps else None

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all GPUs in steps; None on the CPU, and where the device is not known."""
        if not self.steps or self.device in (None, "CPU"):
            return None
        return float(sum(row["step_seconds"] * row["world_size"] for row in self.steps) / 3600)

    @property
    def throughput(self) -> float | None:
        """Tokens a second, over all processes."""
        return sum(row["tokens"] for row in self.steps) / self.seconds if self.seconds else None

    def validation(self) -> list[tuple[int, float]]:
        """(step, loss on data.validation) where it was taken."""
        return [(row["step"], row["validation_loss"]) for row in self.steps if _is_number(row.get("validation_loss"))]


def read_results(uri: str) -> RunResults:
    """The results under an output: what it published, else what its stages stored.

    Raises UserError naming the URI when there is no run, or storage refuses or is away.
    """
    storage = open_storage(uri, field="output")
    published = read_manifest(storage, ARTIFACTS)
    trained = read_manifest(storage, stage_key("train"))
    owner = _read(storage, RUN_FILE, json.loads) or {}
    if published is None and trained is None and not owner:
        raise UserError(
            "NotFound",
            f"found no run: neither {ARTIFACTS}/{MANIFEST} nor {RUN_FILE}; name the folder of the run's spec.output",
            storage.uri,
        )
    document = _read(storage, f"{ARTIFACTS}/{RUN_CONFIG}", yaml.safe_load) if published else None
    document = document if isinstance(document, dict) else {}
    settings = document or (owner.get("identity") if isinstance(owner, dict) else None)
    job = document.get("job") or (owner.get("job") if isinstance(owner, dict) else None)
    about = trained.extra if trained else {}
    log = f"{ARTIFACTS}/{METRICS_FILE}" if published else stage_key("train", METRICS_FILE)
    progress = about.get("progress")
    peak = progress.get("peakGpuMemoryBytes") if isinstance(progress, dict) else None
    return RunResults(
        uri=storage.uri,
        job=str(job)[:_LONGEST] if job else "–",
        settings={path: value for path, value in flatten(settings) if path not in _NOT_SETTINGS},
        steps=[row for row in _read(storage, log, read_lines) or [] if _is_step(row)],
        compared=_published_figures(storage) if published else _stored_figures(storage),
        published=datetime.fromisoformat(published.created) if published else None,
        device=_device(about.get("device"), document.get("device")),
        peak_gpu_bytes=peak if isinstance(peak, int) else None,
    )


def flatten(settings: Any) -> Iterator[tuple[str, str]]:
    """(path, value) of each setting, in their order; bounded, since a file can be anything."""
    found = _leaves(settings, "", _DEEPEST) if isinstance(settings, dict) else iter(())
    yield from islice(found, _MOST_SETTINGS)


def _leaves(value: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and depth:
        for name, each in value.items():
            yield from _leaves(each, f"{path}.{name}" if path else str(name), depth - 1)
    elif value not in (None, {}, []):
        yield path[:_LONGEST], _text(value)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _published_figures(storage: Storage) -> Comparisons:
    document = _read(storage, f"{ARTIFACTS}/{EVALUATION}", json.loads)
    if not isinstance(document, dict):
        return {}
    measured = {name: document.get(name) or {} for name in ("baseline", "final")}
    figures = _checked(storage, f"{ARTIFACTS}/{EVALUATION}", lambda: EvaluationStatus.model_validate(measured))
    return _compare(storage, figures, lambda stage: [f"{ARTIFACTS}/{PREDICTIONS}/{stage}"])


def _stored_figures(storage: Storage) -> Comparisons:
    """The figures of the stages, of a run that published nothing."""
    found: dict[str, Any] = {}
    for (stage, scored_by), name in zip(SCORED_BY.items(), ("baseline", "final"), strict=True):
        manifest = read_manifest(storage, stage_key(scored_by)) or read_manifest(storage, stage_key(stage))
        evaluation = manifest.extra.get("evaluation") if manifest else None
        found[name] = evaluation.get(name) or {} if isinstance(evaluation, dict) else {}
    figures = _checked(storage, stage_key("evaluate", MANIFEST), lambda: EvaluationStatus.model_validate(found))
    return _compare(
        storage, figures, lambda stage: [stage_key(each, PREDICTIONS) for each in (SCORED_BY[stage], stage)]
    )


def _compare(storage: Storage, figures: EvaluationStatus, folders: Callable[[Any], list[str]]) -> Comparisons:
    """Each figure with its interval, from the rows in the first of the folders that has them."""

    def rows(stage: StageName, task: str) -> list[Row] | None:
        keys = [f"{folder}/{task}.jsonl" for folder in folders(stage)]
        return next((found for key in keys if (found := _read(storage, key, read_lines)) is not None), None)

    before, after = SCORED_BY
    tasks = dict.fromkeys([*figures.final, *figures.baseline])
    predictions = {task: (rows(before, task), rows(after, task)) for task in tasks}
    return compare_figures(figures.baseline, figures.final, predictions)


def _read(storage: Storage, key: str, parse: Callable[[bytes], Result]) -> Result | None:
    """A parsed file; None where there is none. Raises ManifestError for one that cannot be parsed."""
    if storage.stat(key) is None:
        return None
    data = storage.read(key)
    return _checked(storage, key, lambda: parse(data))


def _checked(storage: Storage, key: str, make: Callable[[], Result]) -> Result:
    try:
        return make()
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ManifestError("ArtifactBroken", f"{storage.uri}/{key} cannot be read: {reason}") from error


def _device(name: Any, kind: Any) -> str | None:
    if isinstance(name, str) and name:
        return name[:_LONGEST]
    return {"cpu": "CPU", "cuda": "GPU"}.get(str(kind))


def _is_step(row: Any) -> bool:
    columns = ("step", "loss", "step_seconds", "tokens", "world_size")
    return isinstance(row, dict) and all(_is_number(row.get(name)) for name in columns)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
