"""Violations for what pydantic finds: the field, what is found, what is expected."""

import re
from typing import Any

from pydantic import ValidationError

from internvl_api.address import credentials_message, has_credentials, redact, redact_address
from internvl_api.spec.kubernetes.container import ENV_NAME_PATTERN
from internvl_api.spec.model import NAME_PATTERN
from internvl_api.spec.pods import BYTES_PATTERN, SECRET_PATTERN
from internvl_api.spec.publish import REPOSITORY_PATTERN, REVISION_PATTERN
from internvl_api.spec.tracking import EXPERIMENT_PATTERN, RUN_NAME_PATTERN, TRACKER_PATTERN
from internvl_api.types import OUTPUT_PATTERN, SOURCE_PATTERN
from internvl_api.validation.spec_fields import Path, hint, meaning
from internvl_api.validation.suggest import did_you_mean
from internvl_api.validation.violations import Violation

_SOURCES = (
    "s3://, gs:// or az://bucket/key, hf://owner/repo@revision, https://host/file, pvc://claim/folder or an absolute "
    "path"
)
# What to show instead of a regular expression.
_FORMS = {
    SOURCE_PATTERN: _SOURCES,
    OUTPUT_PATTERN: "s3://, gs:// or az://bucket/prefix with the bucket in lower case, or an absolute path on a "
    "mounted volume",
    SECRET_PATTERN: "a name of lower-case letters, digits, '-' and '.' (the Secret's name, never its contents)",
    NAME_PATTERN: "a name of the catalogue, such as InternVL2-2B",
    ENV_NAME_PATTERN: "the name of an environment variable",
    BYTES_PATTERN: "an amount such as 8Gi or 512Mi",
    REPOSITORY_PATTERN: "owner/name, such as team-a/internvl2-2b-coco",
    REVISION_PATTERN: "a branch, such as main",
    TRACKER_PATTERN: "http(s)://host:port/path without user name, password and query; a token belongs in "
    "secrets.tracking",
    EXPERIMENT_PATTERN: "a name of letters, digits and . _ - (of an MLflow experiment also / and @)",
    RUN_NAME_PATTERN: "a name of letters, digits and . _ + / -",
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text (a number or true goes in quotes)",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object",
    "model": "an object",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_MOST = 100  # violations; each may need a suggestion, which costs a search through all names
Problem = Any  # one of pydantic's ErrorDetails


def shape_violations(error: ValidationError) -> list[Violation]:
    """One violation for each of the first hundred errors; unknown fields come first, as they often explain others."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")[:_MOST]
    return [Violation(_field(problem["loc"]), _message(problem, problem["loc"])) for problem in problems]


def _field(path: Path) -> str:
    return "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def _message(problem: Problem, path: Path) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":  # without its value, which may be a misplaced token
        return f"unknown field{hint(path)}"
    if kind == "value_error":  # our own validators write the whole message
        return str(problem["msg"].removeprefix("Value error, "))
    if kind == "missing":
        described = meaning(path)
        return f"required field is missing: {described}" if described else "required field is missing"
    if kind == "too_long":
        return f"found {len(problem['input'])} entries, expected at most {context['max_length']}"
    if context.get("pattern") == SOURCE_PATTERN and has_credentials(problem["input"]):
        return credentials_message(problem["input"])
    hidden = "invalid value (not shown: it may be secret)"
    found = hidden if _may_be_secret(path) else f"found {_short(problem['input'])}"
    expected = _expected(kind, context)
    return f"{found}{_likely(problem, path)}, expected {expected}" if expected else f"{found}: {problem['msg']}"


def _may_be_secret(path: Path) -> bool:
    return path[0] == "secrets" or (path[:2] == ("podTemplate", "env") and path[-1] == "value")


def _expected(kind: str, context: dict[str, Any]) -> str | None:
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = context[key]
        return f"{words} {bound:g}" if isinstance(bound, float) else f"{words} {bound}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "string_pattern_mismatch":
        return _FORMS.get(context["pattern"], f"text that matches {context['pattern']}")
    if kind == "string_too_short":
        return "non-empty text"
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters"
    return _TYPES.get(kind.partition("_")[0])


def _likely(problem: Problem, path: Path) -> str:
    """A suggestion for a value, or ""."""
    found, context = problem["input"], problem.get("ctx", {})
    if not isinstance(found, str):
        return ""
    if problem["type"] == "literal_error":
        return did_you_mean(found, re.findall(r"'([^']+)'", context["expected"]))
    if context.get("pattern") == SOURCE_PATTERN:
        if path[-1] == "source" and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", found):
            return f" (did you mean 'hf://{found}'?)"
        if found.startswith("http://"):
            secure = redact_address("https://" + found.removeprefix("http://"))
            return f" (did you mean {secure!r}?)"
    return ""


def _short(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else redact(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
