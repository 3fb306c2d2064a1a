"""The publishing condition: `CIDEr >= 1.2`, `CIDEr > baseline.CIDEr and coco.BLEU_4 >= 0.3`.

    condition  = clause {"or" clause}
    clause     = comparison {"and" comparison}
    comparison = side (">=" | ">" | "<=" | "<") side
    side       = operand [("+" | "-" | "*") operand]
    operand    = number | ["baseline."] [task "."] metric

Without parentheses and calls the language is a regular expression, so an API server can refuse everything else,
including unknown metrics.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Figures = Mapping[str, Mapping[str, float]]  # task -> metric -> value

CAPTION_METRICS = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr")
VQA_METRICS = ("exact_match", "vqa_accuracy")
GROUNDING_METRICS = ("box_accuracy",)
_WAYS = ("image_to_text", "text_to_image")
# InternVL-C compares pooled vision features with the text's, InternVL-G the features of its queries.
RETRIEVAL_METRICS = tuple(f"{model}_{way}_R{k}" for model in ("C", "G") for way in _WAYS for k in (1, 5, 10))
# Of every task whose answers are texts: they say whether the model answers at all, not how well.
ANSWER_METRICS = ("distinct_answers", "answers_at_limit", "empty_answers", "repetition")
METRICS = (*CAPTION_METRICS, *VQA_METRICS, *GROUNDING_METRICS, *RETRIEVAL_METRICS, *ANSWER_METRICS)

_NAME = rf"(baseline\.)?([A-Za-z][A-Za-z0-9_]*\.)?({'|'.join(sorted(METRICS, key=len, reverse=True))})"  # R10 before R1
_NUMBER = r"[0-9]+(\.[0-9]+)?"
_OPERAND = rf"({_NAME}|{_NUMBER})"
_SIDE = rf"{_OPERAND}( *[-+*] *{_OPERAND})?"
_COMPARISON = rf"{_SIDE} *(>=|<=|>|<) *{_SIDE}"
CONDITION_PATTERN = rf"^ *{_COMPARISON}( +(and|or) +{_COMPARISON})* *$"

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_COMBINE: dict[str, Callable[[float, float], float]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Operand:
    """A metric: of one task when `task` is set, of the base model when `baseline`."""

    metric: str
    task: str | None
    baseline: bool

    def __str__(self) -> str:
        return ("baseline." if self.baseline else "") + (f"{self.task}." if self.task else "") + self.metric


class ConditionError(ValueError):
    """Text that is not a condition, or a condition whose metrics are missing."""


def operands(condition: str) -> list[Operand]:
    """Every metric in a condition. Raises ConditionError when it is not a condition."""
    if not re.match(CONDITION_PATTERN, condition):
        raise ConditionError(f"found {condition!r}, which is not a condition")
    found = re.finditer(_NAME, condition)
    return [Operand(match[3], match[2][:-1] if match[2] else None, bool(match[1])) for match in found]


def unknown_metric(condition: str) -> str | None:
    """The first word of a condition that should be a metric and is none."""
    words = re.findall(r"[A-Za-z_][A-Za-z0-9_.]*", condition)
    names = [word.rpartition(".")[2] for word in words if word not in ("and", "or")]
    return next((name for name in names if name not in METRICS), None)


def holds(condition: str, final: Figures, baseline: Figures) -> tuple[bool, str]:
    """Whether a condition is met, and the compared values: `CIDEr = 0.8312; publishIf: CIDEr >= 1.2`.

    `and` binds closer than `or`. Raises ConditionError.
    """

    def compare(text: str) -> bool:
        left, sign, right = re.split(r" *(>=|<=|>|<) *", text.strip())
        return _COMPARE[sign](_side(left, final, baseline), _side(right, final, baseline))

    named = {str(operand): _find(operand, final, baseline) for operand in operands(condition)}
    clauses = [re.split(" +and +", clause) for clause in re.split(" +or +", condition)]
    met = any(all(compare(part) for part in clause) for clause in clauses)
    figures = ", ".join(f"{name} = {value:.4f}" for name, value in named.items())
    return met, f"{figures}; publishIf: {condition.strip()}"


def tasks_with(metric: str, tasks: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Names of the tasks (name -> its metrics) that measure a metric."""
    return (name for name, metrics in tasks.items() if metric in metrics)


def _side(text: str, final: Figures, baseline: Figures) -> float:
    first, *rest = re.split(r" *([-+*]) *", text.strip())
    value = _value(first, final, baseline)
    return _COMBINE[rest[0]](value, _value(rest[1], final, baseline)) if rest else value


def _value(text: str, final: Figures, baseline: Figures) -> float:
    if re.fullmatch(_NUMBER, text):
        return float(text)
    (operand,) = operands(f"{text} > 0")
    return _find(operand, final, baseline)


def _find(operand: Operand, final: Figures, baseline: Figures) -> float:
    figures = baseline if operand.baseline else final
    if operand.task:
        figures = {operand.task: figures.get(operand.task, {})}
    found = [metrics[operand.metric] for metrics in figures.values() if operand.metric in metrics]
    if len(found) != 1:
        raise ConditionError(f"{operand}: found {len(found)} such metrics, expected one")
    if not math.isfinite(found[0]):
        raise ConditionError(f"{operand} is {found[0]}, expected a finite number")
    return found[0]
