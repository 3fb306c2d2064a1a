"""What an API server says to a spec: its defaults, schema and rules, without a server."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import cel
import jsonschema
from cel.stdlib import add_stdlib_to_context
from internvl_api.crd import root_schema, spec_schema

SCHEMA = spec_schema()
# OpenAPI's boolean exclusiveMinimum is JSON schema draft 4's
_validator = jsonschema.Draft4Validator(SCHEMA)
_OLD = "oldSelf.value()"
_OPTIONAL = re.compile(
    rf"((?:{re.escape(_OLD)}|\bself|\boldSelf)(?:\.\w+)*)((?:\.\?\w+)+)\.(?:(hasValue)\(\)|orValue\(([^()]*)\))"
)


class PlacedRule(NamedTuple):
    """A rule and the path of the field that it stands at; `[]` for any value of a map."""

    at: str
    rule: dict[str, Any]


def rules_of(schema: dict[str, Any], at: str) -> Iterator[PlacedRule]:
    """All rules of a schema."""
    for rule in schema.get("x-kubernetes-validations", ()):
        yield PlacedRule(at, rule)
    for name, child in schema.get("properties", {}).items():
        yield from rules_of(child, f"{at}.{name}" if at else name)
    for key in ("additionalProperties", "items"):
        if isinstance(values := schema.get(key), dict):
            yield from rules_of(values, f"{at}[]")


RULES = tuple(rules_of(SCHEMA, "spec"))
TRANSITIONS = tuple(placed for placed in rules_of(root_schema(), "") if placed.at == "")


def schema_errors(spec: dict[str, Any]) -> list[str]:
    """Paths of the fields that the schema refuses, as `evaluation.tasks.coco.task`."""
    return [".".join(map(str, error.absolute_path)) for error in _validator.iter_errors(spec)]


def rule_messages(spec: dict[str, Any]) -> list[str]:
    """What the rules that refuse it say, as `spec.data: found neither …`."""
    return [message for _, message in refusals(spec)]


def refusals(spec: dict[str, Any]) -> Iterator[tuple[PlacedRule, str]]:
    """The rules that refuse it, each with what it says."""
    filled = _with_defaults(spec, SCHEMA)
    for placed in RULES:
        for path, value in _values(filled, placed.at.removeprefix("spec"), "spec"):
            if message := refusal(placed.rule, value):
                yield placed, f"{path}{placed.rule.get('fieldPath', '')}: {message}"


def refusal(rule: dict[str, Any], value: Any, old: Any = None) -> str:
    """The message of a rule that refuses a value; empty when it does not."""
    known = {"self": value, "oldSelf": old if old is not None else cel.OptionalValue.none()}
    if evaluate(rule["rule"], known) is True:
        return ""
    return str(evaluate(rule["messageExpression"], known)) if "messageExpression" in rule else str(rule["message"])


def evaluate(expression: str, known: dict[str, Any]) -> Any:
    """A CEL expression with what Kubernetes adds to the language."""
    context = cel.Context(known)
    add_stdlib_to_context(context)
    context.add_function("format", _format)
    context.add_function("join", lambda texts, between: between.join(texts))
    context.add_function("split", lambda text, at: text.split(at))
    context.add_function("substring", lambda text, start: text[start:])
    context.add_function("find", lambda text, pattern: (re.search(pattern, text) or [""])[0])
    return cel.evaluate(_OPTIONAL.sub(_plain, expression), context)


def _plain(match: "re.Match[str]") -> str:
    """`self.?a.?b.orValue(0)` in words of CEL's core."""
    start, steps = match[1], match[2].split(".?")[1:]
    paths = [".".join([start, *steps[: n + 1]]) for n in range(len(steps))]
    there = " && ".join(f"has({path})" for path in paths)
    return f"({there})" if match[3] else f"({there} ? {paths[-1]} : {match[4]})"


def _format(text: str, values: list[Any]) -> str:
    return re.sub("%[sd]", lambda _: _shown(values.pop(0)), text)


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def _values(value: Any, path: str, name: str) -> Iterator[tuple[str, Any]]:
    """Each value at a path such as `.evaluation.tasks[]`, with its own path; none where it is not there."""
    if not path:
        yield name, value
    elif path.startswith("[]"):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _values(each, path[2:], f"{name}[{key}]")
    else:
        step, rest = re.match(r"\.(\w+)(.*)", path).groups()  # type: ignore[union-attr]
        if isinstance(value, dict) and step in value:
            yield from _values(value[step], rest, f"{name}.{step}")


def _with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A server fills defaults in before it looks at the rules; no item of a list has any."""
    if not isinstance(value, dict):
        return value
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    filled = {name: child["default"] for name, child in properties.items() if "default" in child} | value
    return {name: _with_defaults(each, properties.get(name, others)) for name, each in filled.items()}
