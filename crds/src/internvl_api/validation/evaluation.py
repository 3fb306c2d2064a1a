"""What refuses `spec.evaluation`: tasks that cannot work, and publishing conditions that nothing can decide."""

import re
from collections.abc import Callable, Iterator

from internvl_api.publish_condition import (
    CONDITION_PATTERN,
    METRICS,
    Operand,
    operands,
    tasks_with,
    unknown_metric,
)  # fmt: skip
from internvl_api.spec import Evaluation, InternVLFineTuneSpec
from internvl_api.spec.evaluation import TASK_DEFAULTS, EvaluationTask
from internvl_api.validation.cel_rules import Rule, Values, given, is_true, not_empty, rule
from internvl_api.validation.evaluation_alone import ALONE
from internvl_api.validation.suggest import did_you_mean
from internvl_api.validation.violations import Violation

_INVALID = "InvalidCondition"
_FIELD = "spec.evaluation.publishIf"
_BASELINE_METRIC = "baseline[.][A-Za-z0-9_.]+"
_USES_BASELINE = f"(^|[^A-Za-z0-9_]){_BASELINE_METRIC}"  # a task's name may end in baseline


@rule(
    "evaluation.tasks",
    "!('baseline' in self)",
    "task name 'baseline' is reserved: publishIf uses it for the base model's metrics; rename the task",
)
def baseline_is_reserved(tasks: dict[str, EvaluationTask]) -> Values | None:
    """No task is called baseline."""
    return {} if "baseline" in tasks else None


@rule(
    "evaluation.tasks[]",
    "self.?minNewTokens.orValue(0) <= self.?maxNewTokens.orValue(4096)",
    "minNewTokens {least:d} is more than maxNewTokens {most:d}; lower minNewTokens or raise maxNewTokens",
    field="minNewTokens",
    least="self.minNewTokens",
    most="self.maxNewTokens",
)
def answer_lengths(task: EvaluationTask) -> Values | None:
    """The bounds of an answer's length are in order."""
    most = TASK_DEFAULTS[task.task].max_new_tokens if task.max_new_tokens is None else task.max_new_tokens
    least = task.min_new_tokens
    return {"least": least, "most": most} if least is not None and least > most else None


@rule(
    "evaluation.publishIf",  # a rule and no pattern: where a pattern fails, a server shows the user all of it
    f"self.matches(r'{CONDITION_PATTERN}')",
    "found '{found}', which is not a condition{hint}; write a metric, a comparison and a number or metric, as "
    "'CIDEr >= 1.2' or 'CIDEr > baseline.CIDEr', joined by and / or",
    found="self",
    hint="''",
)
def is_condition(condition: str) -> Values | None:
    """publishIf is in the language of conditions. The hint is Python's alone."""
    if re.match(CONDITION_PATTERN, condition):
        return None
    hint, unknown = "", unknown_metric(condition)
    if unknown:
        known = did_you_mean(unknown, METRICS) or f" (metrics: {', '.join(METRICS)})"
        hint = f": no metric is called '{unknown}'{known}"
    return {"found": condition, "hint": hint}


@rule(
    "evaluation",
    "!has(self.publishIf) || (has(self.tasks) && self.tasks.size() > 0)",
    "publishIf '{found}' needs metrics, but evaluation.tasks is empty; add a task that measures them",
    field="publishIf",
    reason=_INVALID,
    found="self.publishIf",
)
def condition_has_tasks(evaluation: Evaluation) -> Values | None:
    """Some task measures metrics for publishIf."""
    condition = evaluation.publish_if
    return {"found": condition} if condition is not None and not evaluation.tasks else None


@rule(
    "evaluation",
    f"!has(self.publishIf) || self.baseline || !self.publishIf.matches('{_USES_BASELINE}')",
    "publishIf uses {operand}, but evaluation.baseline is false; set evaluation.baseline to true, or compare with a "
    "number",
    field="publishIf",
    reason=_INVALID,
    operand=f"self.publishIf.find('{_USES_BASELINE}').find('{_BASELINE_METRIC}')",
)
def condition_has_baseline(evaluation: Evaluation) -> Values | None:
    """The base model is evaluated where publishIf compares with it."""
    used = re.search(_USES_BASELINE, evaluation.publish_if or "")
    if evaluation.baseline or not used:
        return None
    return {"operand": used[0][used[0].index("baseline") :]}


@rule(
    "evaluation",
    "!self.baseline || (has(self.tasks) && self.tasks.size() > 0)",
    "baseline is true, but evaluation.tasks is empty; add tasks, or remove baseline",
    field="baseline",
)
def baseline_has_tasks(evaluation: Evaluation) -> Values | None:
    """The base model is evaluated only on tasks."""
    return {} if evaluation.baseline and not evaluation.tasks else None


_HELD_OUT = f"({given('data.validationMeta')} || ({not_empty('data.validation')}) || {ALONE})"


@rule(
    "",
    f"!{given('evaluation.everySteps')} || {_HELD_OUT}",
    "everySteps {every:d} needs data.validation, which is empty; add a dataset there, or remove everySteps",
    field="evaluation.everySteps",
    every="self.evaluation.everySteps",
)
def validation_has_data(spec: InternVLFineTuneSpec) -> Values | None:
    """A loss on held-out rows has such rows."""
    every = spec.evaluation.every_steps
    return {"every": every} if every is not None and _lacks_held_out(spec) else None


def _lacks_held_out(spec: InternVLFineTuneSpec) -> bool:
    """Whether training has no held-out rows; method none refuses the settings that need them in its own words."""
    return spec.trains and not spec.data.has_validation


def _needs_held_out(field: str, is_set: str, is_asked_for: Callable[[InternVLFineTuneSpec], bool]) -> Rule:
    """A setting that has no effect without held-out rows.

    Args:
        is_set: CEL of the spec, true where the setting is given.
        is_asked_for: the same in Python.
    """
    name = field.rpartition(".")[2]
    message = f"{name} needs data.validation, which is empty; add a dataset there, or remove {name}"

    @rule("", f"!{is_set} || {_HELD_OUT}", message, field=field)
    def has_held_out_rows(spec: InternVLFineTuneSpec) -> Values | None:
        return {} if is_asked_for(spec) and _lacks_held_out(spec) else None

    return has_held_out_rows


HELD_OUT_RULES = (
    validation_has_data,
    _needs_held_out(
        "training.earlyStopping", given("training.earlyStopping"), lambda spec: spec.training.early_stopping is not None
    ),
    _needs_held_out("checkpoint.keepBest", is_true("checkpoint.keepBest"), lambda spec: spec.checkpoint.keep_best),
    _needs_held_out("training.samples", given("training.samples"), lambda spec: spec.training.samples is not None),
)
RULES = (
    baseline_is_reserved, baseline_has_tasks, *HELD_OUT_RULES, is_condition, condition_has_tasks,
    condition_has_baseline, answer_lengths,
)  # fmt: skip


def unmeasured(evaluation: Evaluation) -> Iterator[Violation]:
    """Metrics of publishIf that no task measures, or more than one."""
    measured = evaluation.metrics()
    if not measured:  # a rule says so
        return
    for operand in _operands(evaluation):
        names = [name for name in tasks_with(operand.metric, measured) if operand.task in (None, name)]
        if not names:
            have = ", ".join(f"{name} ({', '.join(metrics)})" for name, metrics in measured.items())
            text = f"found {operand}, which no task measures; use a metric of {have}"
            yield Violation(_FIELD, text, _INVALID)
        elif len(names) > 1:
            text = f"found {operand}, which {len(names)} tasks measure; write {names[0]}.{operand.metric}"
            yield Violation(_FIELD, text, _INVALID)


def _operands(evaluation: Evaluation) -> list[Operand]:
    """The metrics of publishIf; none where it is missing or not a condition, which a rule reports."""
    condition = evaluation.publish_if
    return operands(condition) if condition and re.match(CONDITION_PATTERN, condition) else []
