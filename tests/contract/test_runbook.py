"""docs/runbook.md has a row for every reason that a condition, an event or a pod's last word can have."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
from internvl_api.status import StageName
from internvl_operator.core import conditions
from internvl_operator.core.policies import failure_policy
from internvl_operator.core.stages import Stage
from ivft_cluster.paths import CHECKOUT

SOURCES = ("crds/src", "operator/src", "trainer_image/src")
# Callables that are given a reason -> its position; as a keyword it is called `reason` everywhere.
TAKES_A_REASON = {
    "SpecError": 0, "UserError": 0, "CheckpointError": 0, "BadFile": 0, "AccessDenied": 0, "Unavailable": 0,
    "Finding": 0, "_Problem": 0, "ManifestError": 0, "single": 0, "StartupProblem": 0, "Refused": 0,
    "_infrastructure": 0, "PolicyRule": 1, "Outcome": 1, "Event": 1, "set_phase": 1, "_explain": 1,
    "_failed": 1, "_result": 1, "Fault": 0, "_warning": 1, "RangesUnsupported": 0, "SourceChanged": 0,
}  # fmt: skip
GIVES_A_REASON = re.compile(r"reason|fault")  # functions by their names
HOLDS_A_REASON = ("reason", "default")  # variables
REASON = re.compile(r"^[A-Z][a-z]+(?:[A-Z][a-z]*)*$")
ROW = re.compile(r"^\| (`[A-Za-z]+`(?:, `[A-Za-z]+`)*) \|", re.MULTILINE)


def _words(tree: ast.AST) -> Iterator[str]:
    """Whole strings that look like a reason; parts of an f-string, and what something is compared with, are none."""
    if isinstance(tree, ast.JoinedStr | ast.Call | ast.Compare):
        return
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str) and REASON.match(tree.value):
        yield tree.value
    for child in ast.iter_child_nodes(tree):
        yield from _words(child)


def _reasons_given(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            position = TAKES_A_REASON.get(name)
            given = node.args[position : position + 1] if position is not None else []
            for part in [*given, *(keyword.value for keyword in node.keywords if keyword.arg == "reason")]:
                if not isinstance(part, ast.Call):  # what a call is given for itself, it is asked for itself
                    yield from _words(part)
        elif isinstance(node, ast.FunctionDef) and GIVES_A_REASON.search(node.name):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from _words(inner.value)
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in HOLDS_A_REASON:
            yield from _words(node.value)


def _reasons_in_code() -> set[str]:
    files = [path for folder in SOURCES for path in (CHECKOUT / folder).rglob("*.py")]
    found = {reason for path in files for reason in _reasons_given(ast.parse(path.read_text(encoding="utf-8")))}
    tables = [
        *failure_policy._STALLING.values(),
        *failure_policy._NOT_THE_RUN.values(),
        *failure_policy._GAVE_WAY.values(),
    ]
    tables += [
        *failure_policy._SECONDARY,
        *failure_policy._NOT_RETRIED,
        *failure_policy._TOO_LARGE,
        *conditions._MEMORY_REASONS.values(),
    ]
    tables += [reason for reason, _ in conditions._FALSE.values()]
    names: tuple[StageName, ...] = StageName.__args__  # type: ignore[attr-defined]
    stages = [f"{Stage(name).title}{word}" for name in names for word in ("Starting", "Running", "Ending")]
    return found | {*tables, *stages}


def _rows() -> list[str]:
    text = (CHECKOUT / "docs/runbook.md").read_text(encoding="utf-8")
    reasons = text[: text.index("## What a changed spec does")]
    return [name for match in ROW.finditer(reasons) for name in re.findall(r"\w+", match[1])]


def test_every_reason_has_its_row() -> None:
    assert sorted(_reasons_in_code() - set(_rows())) == []


def test_no_reason_has_two_rows() -> None:
    rows = sorted(_rows())
    assert [one for one, other in pairwise(rows) if one == other] == []


@pytest.mark.parametrize(
    "reason",
    [
        "WorkerKilled",
        "NodeLost",
        "PeerLost",
        "SecretMissing",
        "QuotaExceeded",
        "ImageNotAllowed",
        "GpuOutOfMemory",
        "BatchNotDivisible",
    ],
)
def test_the_search_finds_reasons_in_every_syntax(reason: str) -> None:
    assert reason in _reasons_in_code()
