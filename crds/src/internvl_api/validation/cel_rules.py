"""Rules with two implementations: CEL for the API server, Python for everything else, and one message template.

A rule is the Python check with the CEL expression in its decorator:

    @rule("image", "self.minDynamicPatch <= self.maxDynamicPatch",
          "minDynamicPatch {least:d} exceeds maxDynamicPatch {most:d}; lower minDynamicPatch or raise maxDynamicPatch",
          least="self.minDynamicPatch", most="self.maxDynamicPatch")
    def tile_bounds(image: Image) -> Values | None: ...

CEL sees only what the user wrote, Python also what the recipe adds: whatever CEL refuses, Python refuses with the same
message (tests/api/test_rules_agree.py). Language: Kubernetes documentation, "Common Expression Language in Kubernetes".

Ratcheting: the API server does not apply a new rule to an old object while the field that carries the rule is
unchanged. So each rule stands as deep in the schema as possible. A rule about several sections stands at `spec`
and compares with the old object itself; without that, an old object that breaks it could not be suspended.

Cost: the API server estimates the cost of each rule and refuses a CRD that is too expensive. It assumes the longest
possible result for `string(1)`, and none for `'%d'.format([1])`: messages use the latter.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from internvl_api.validation.violations import Violation

Schema = dict[str, Any]
Values = Mapping[str, object]
Check = Callable[[Any], Values | None]
_PLACEHOLDER = re.compile(r"\{(\w+)(:d)?\}")


@dataclass(frozen=True)
class Rule:
    """A cross-field rule.

    Attributes:
        at: path below `spec` of the field that carries the rule and is its `self`; `[]` stands for every value of a
            map or list, "" for the spec itself.
        holds: CEL, true when the rule holds.
        message: template; `{name}` is text, `{name:d}` a whole number.
        values: CEL of each placeholder.
        check: takes what stands at `at`; the values of the placeholders when the rule is broken, None when it holds.
        field: field that the message is about, when it is below `at`.
        required: the API server reports a missing value rather than an invalid one.
        before: cheaper condition for the old object, where `holds` would exceed the cost limit.
    """

    at: str
    holds: str
    message: str
    values: Mapping[str, str]
    check: Check
    field: str
    reason: str
    required: bool
    before: str

    def violation(self, path: str, values: Values) -> Violation:
        """The violation at a path, the message filled in."""
        field = f"{path}.{self.field}" if self.field else path
        return Violation(field, self.message.format(**values), self.reason)


def rule(
    at: str,
    holds: str,
    message: str,
    *,
    field: str = "",
    reason: str = "InvalidSpec",
    required: bool = False,
    before: str = "",
    **values: str,
) -> Callable[[Check], Rule]:
    """Decorator that makes a Rule of its Python check; further keyword arguments are the CEL of placeholders."""

    def decorate(check: Check) -> Rule:
        names = {match[1] for match in _PLACEHOLDER.finditer(message)}
        if names != set(values):
            raise ValueError(f"{check.__name__}: message has {sorted(names)}, CEL has {sorted(values)}")
        return Rule(at, holds, message, values, check, field, reason, required, before)

    return decorate


def broken(rules: Iterable[Rule], spec: object, path: str = "spec") -> Iterator[Violation]:
    """The violations of rules, found by their Python checks. Fields begin with `path`."""
    for each in rules:
        for where, section in _sections(spec, each.at.replace("[]", ".[]").split(".") if each.at else [], path):
            values = each.check(section)
            if values is not None:
                yield each.violation(where, values)


def _sections(value: Any, steps: list[str], path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything at a path; nothing where a value is absent."""
    if value is None:
        return
    if not steps:
        yield path, value
    elif steps[0] == "[]":
        named = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in named:
            yield from _sections(each, steps[1:], f"{path}[{name}]" if isinstance(name, int) else f"{path}.{name}")
    else:
        attribute = re.sub("([A-Z])", lambda match: f"_{match[1].lower()}", steps[0])
        yield from _sections(getattr(value, attribute), steps[1:], f"{path}.{steps[0]}".lstrip("."))


def add_rules(schema: Schema, rules: Iterable[Rule]) -> None:
    """Add the CEL of each rule at its field of a schema, in place."""
    for each in rules:
        node = schema
        for step in each.at.replace("[]", ".[]").split(".") if each.at else ():
            values = "items" if "items" in node else "additionalProperties"
            node = node[values] if step == "[]" else node["properties"][step]
        node.setdefault("x-kubernetes-validations", []).append(_validation(each))


def _validation(each: Rule) -> Schema:
    out: Schema = {"rule": each.holds}
    if not each.at and "oldSelf" not in each.holds:
        before = re.sub(r"\bself\b", "oldSelf.value()", each.before or each.holds)
        out = {"rule": f"(oldSelf.hasValue() && !({before})) || {each.holds}", "optionalOldSelf": True}
    out |= {"messageExpression": _format(each)} if each.values else {"message": each.message}
    if each.field:
        out["fieldPath"] = f".{each.field}"
    return out | ({"reason": "FieldValueRequired"} if each.required else {})


def _format(each: Rule) -> str:
    """The message template as CEL."""
    text = _PLACEHOLDER.sub(lambda match: "%d" if match[2] else "%s", each.message)
    values = ", ".join(each.values[match[1]] for match in _PLACEHOLDER.finditer(each.message))
    return f"{json.dumps(text)}.format([{values}])"


def optional(path: str) -> str:
    """CEL for an optional field: `a.b` becomes `.?a.?b`, which does not fail when `a` is absent."""
    return "".join(f".?{part}" for part in path.split("."))


def given(*paths: str) -> str:
    """CEL that is true when every field is set."""
    return " && ".join(f"self{optional(path)}.hasValue()" for path in paths)


def not_empty(path: str) -> str:
    """CEL of the spec: whether a map or list is given and has an entry."""
    return f"{given(path)} && self.{path}.size() > 0"


def is_true(path: str) -> str:
    """CEL of the spec: whether a flag is set."""
    return f"self{optional(path)}.orValue(false)"


def positive(number: str) -> str:
    """CEL for a number, or 1 when it is below 1: its own field reports that, and no rule divides by 0."""
    return f"({number} > 0 ? {number} : 1)"
