"""The colour of the report: red for a model that does not answer or got worse, amber for doubts, else green."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from internvl_api.publish_condition import ANSWER_METRICS, METRICS
from internvl_api.spec.evaluation import makes_text

from internvl_trainer.answer_figures import answer_figures
from internvl_trainer.report.bootstrap import FEWEST_ROWS
from internvl_trainer.report.comparison import Comparison, Comparisons, Outcome
from internvl_trainer.report.record import Record

Colour = Literal["good", "open", "bad"]
"""Green, amber, red."""

_COLLAPSED_VARIETY, _LOW_VARIETY = 0.1, 0.25  # distinct answers per distinct reference
_TWO_WORDS = 2  # distinct references: always "no" may be right where few references are "yes"
_COLLAPSED_SHARE = 0.5  # of empty answers, or of repetition above that of the references
_MANY_EMPTY, _MUCH_REPETITION, _MANY_CUT = 0.05, 0.1, 0.25
_JUDGED_BY = ("CIDEr", "vqa_accuracy", *METRICS)  # the first that can be told from noise decides for its task


@dataclass(frozen=True)
class TaskEvidence:
    """Figures and intervals of one task.

    Attributes:
        rows: the number of answers.
        answers, references: ANSWER_METRICS of the answers, and of the first reference of each; empty when not known.
        outcome: of the difference to the base model; None when the base model was not evaluated.
    """

    name: str
    rows: int
    answers: Mapping[str, float]
    references: Mapping[str, float]
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Judgement:
    """A colour with its headline and its reasons. The headline is empty for a model without doubts."""

    colour: Colour
    headline: str = ""
    reasons: tuple[str, ...] = ()


def judge(tasks: Sequence[TaskEvidence]) -> Judgement:
    """Red for a model that has collapsed or only got worse, amber for doubts, green for the rest."""
    collapsed = [reason for task in tasks for reason in _collapse(task)]
    if collapsed:
        return Judgement("bad", "The model has collapsed: do not use it", tuple(collapsed))
    by_outcome: dict[Outcome | None, list[str]] = {}
    for task in tasks:
        by_outcome.setdefault(task.outcome, []).append(task.name)
    gains, losses = by_outcome.get("gain", []), by_outcome.get("loss", [])
    if losses:
        reasons = (f"worse than the base model: {', '.join(losses)}", *_gained(gains))
        headline = "Worse than the base model" if not gains else "Better on some tasks, worse on others"
        return Judgement("open" if gains else "bad", headline, reasons)
    doubts = [reason for task in tasks for reason in _doubts(task)]
    if doubts:
        return Judgement("open", "Look at the answers before you use this model", (*doubts, *_gained(gains)))
    if gains:
        return Judgement("good", "", tuple(_gained(gains)))
    if noisy := by_outcome.get("noise"):
        return Judgement("open", "No gain over the base model", (f"the difference may be chance: {', '.join(noisy)}",))
    if unknown := by_outcome.get("unknown"):
        reason = f"too few rows, or no figure of each row (from {FEWEST_ROWS} rows on): {', '.join(unknown)}"
        return Judgement("open", "A gain over the base model cannot be told from chance", (reason,))
    return Judgement("good")


def evidence(record: Record, compared: Comparisons) -> list[TaskEvidence]:
    """What the stored answers and figures of the trained model say, task by task."""
    found = []
    for task in record.final:
        _, after = record.predictions.get(task, (None, None))
        rows = [row for row in after or () if isinstance(row.get("prediction"), str)]
        settings = record.config.evaluation.tasks.get(task)
        is_text = settings is None or makes_text(settings.task)
        found.append(
            TaskEvidence(
                task,
                len(rows),
                answer_figures(rows) if is_text else {},
                answer_figures([{"prediction": _reference(row)} for row in rows]) if is_text else {},
                _outcome(compared[task]) if record.baseline.get(task) else None,
            )
        )
    return found


def _reference(row: Mapping[str, Any]) -> str:
    references = row.get("references") or [""]
    return str(references[0])


def _outcome(compared: Sequence[Comparison]) -> Outcome:
    outcomes = {each.metric: each.outcome for each in compared if each.metric not in ANSWER_METRICS}
    return next((outcomes[name] for name in _JUDGED_BY if outcomes.get(name, "unknown") != "unknown"), "unknown")


def _gained(gains: Sequence[str]) -> list[str]:
    return [f"better than the base model: {', '.join(gains)}"] if gains else []


def _collapse(task: TaskEvidence) -> Iterator[str]:
    """Why a task's answers are worthless, whatever their figures."""
    answers = task.answers
    if not answers:
        return
    variety, distinct, wanted = _variety(task)
    if task.rows >= FEWEST_ROWS and ((distinct == 1 and wanted > _TWO_WORDS) or variety < _COLLAPSED_VARIETY):
        yield f"distinct answers to {task.name}: {distinct} in {task.rows} rows (distinct references: {wanted})"
    if answers["empty_answers"] > _COLLAPSED_SHARE:
        yield f"{answers['empty_answers']:.0%} of the answers to {task.name} are empty"
    if _repetition(task) > _COLLAPSED_SHARE:
        yield f"answers to {task.name} repeat themselves (repetition {answers['repetition']:.2f})"


def _doubts(task: TaskEvidence) -> Iterator[str]:
    """What a person should look at before they believe a task's figures."""
    answers = task.answers
    if not answers:
        return
    variety, distinct, wanted = _variety(task)
    if distinct == 1 < wanted or variety < _LOW_VARIETY:
        yield f"distinct answers to {task.name}: {distinct} in {task.rows} rows (distinct references: {wanted})"
    if answers["empty_answers"] > _MANY_EMPTY:
        yield f"{answers['empty_answers']:.0%} of the answers to {task.name} are empty"
    if _repetition(task) > _MUCH_REPETITION:
        yield f"answers to {task.name} repeat themselves (repetition {answers['repetition']:.2f})"
    if answers.get("answers_at_limit", 0.0) > _MANY_CUT:
        yield f"{answers['answers_at_limit']:.0%} of the answers to {task.name} are cut at maxNewTokens"


def _variety(task: TaskEvidence) -> tuple[float, int, int]:
    """(distinct answers per distinct reference, distinct answers, distinct references)."""
    distinct, wanted = (round(each["distinct_answers"] * task.rows) for each in (task.answers, task.references))
    return distinct / max(1, wanted), distinct, wanted


def _repetition(task: TaskEvidence) -> float:
    """The repetition above that of the references, since tables and lists of boxes repeat themselves."""
    return task.answers["repetition"] - task.references["repetition"]
