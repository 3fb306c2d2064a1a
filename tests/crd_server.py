"""What an API server of 1.25 or newer says to a spec: its defaults, schema and rules, without a server."""

from typing import Any

import cel
import jsonschema
from internvl_api.crd import spec_schema

SCHEMA = spec_schema()
RULES = SCHEMA["x-kubernetes-validations"]
# OpenAPI's boolean exclusiveMinimum is JSON schema draft 4's
_validator = jsonschema.Draft4Validator(SCHEMA)


def schema_errors(spec: dict[str, Any]) -> list[str]:
    """Paths of the fields that the schema refuses, as `evaluation.tasks.coco.task`."""
    return [".".join(map(str, error.absolute_path)) for error in _validator.iter_errors(spec)]


def rule_messages(spec: dict[str, Any]) -> list[str]:
    """Messages of the cross-field rules that refuse it."""
    filled = _with_defaults(spec, SCHEMA)
    return [rule["message"] for rule in RULES if cel.evaluate(rule["rule"], {"self": filled}) is not True]


def _with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A server fills defaults in before it looks at the rules."""
    if not isinstance(value, dict):
        return value
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    filled = {name: child["default"] for name, child in properties.items() if "default" in child} | value
    return {name: _with_defaults(each, properties.get(name, others)) for name, each in filled.items()}
