"""Rules for the names of datasets and tasks, which become parts of file names, labels and conditions."""

import re
from collections.abc import Mapping

from internvl_api.spec.data import DATASET_NAME_PATTERN
from internvl_api.spec.evaluation import TASK_NAME_PATTERN
from internvl_api.validation.cel_rules import Rule, Values, rule


def _named(at: str, pattern: str, message: str) -> Rule:
    """The rule that every name of a map matches a pattern."""

    @rule(
        at,
        f"self.all(name, name.matches('{pattern}'))",
        message,
        found=f"self.filter(name, !name.matches('{pattern}'))[0]",
    )
    def check(entries: Mapping[str, object]) -> Values | None:
        wrong = next((name for name in entries if not re.fullmatch(pattern, name)), None)
        return None if wrong is None else {"found": wrong}

    return check


_DATASET = (
    "invalid dataset name '{found}'; use a letter or digit, then letters, digits, '.', '_' and '-', at most 128 in all"
)
_TASK = (
    "invalid task name '{found}'; use a letter, then letters, digits and _, at most 40 in all, so that publishIf can "
    "name the task"
)
RULES = (
    _named("data.train", DATASET_NAME_PATTERN, _DATASET),
    _named("data.validation", DATASET_NAME_PATTERN, _DATASET),
    _named("evaluation.tasks", TASK_NAME_PATTERN, _TASK),
)
