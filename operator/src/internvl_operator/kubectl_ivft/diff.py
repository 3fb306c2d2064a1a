"""The fields in which two runs' configurations differ, after recipes and defaults were filled in."""

import json
from typing import Any, NamedTuple

from internvl_api.validation.cluster import InCluster

from internvl_operator.core.run import read_status, recorded_defaults, resolve_spec
from internvl_operator.core.telemetry import printable
from internvl_operator.kubectl_ivft.client import UserError

Raw = dict[str, Any]
ABSENT = "-"


class Difference(NamedTuple):
    """A field of the spec with both values as text."""

    field: str
    first: str
    second: str


def differences(first: Raw, second: Raw) -> list[Difference]:
    """What differs between two raw runs, in the order of the spec. Raises UserError for an invalid spec."""
    return list(_between("", resolved(first), resolved(second)))


def resolved(raw: Raw) -> Raw:
    """The spec as the trainer gets it; addresses have no query, which may hold a key."""
    metadata, status = raw["metadata"], read_status(raw.get("status") or {})
    text = json.dumps(raw.get("spec") or {})
    run = f"{metadata['namespace']}/{metadata['name']}"
    cluster = InCluster.of(status, defaults=recorded_defaults(status))
    found = resolve_spec(run, metadata["uid"], text, cluster)
    if found.spec is None or found.run_config is None:
        raise UserError(f"the spec of the run {metadata['name']!r} is invalid: {found.error}")
    document = found.spec.model_dump(mode="json", by_alias=True)
    trained = found.run_config.model_dump(mode="json", by_alias=True, include={"model", "evaluation"})
    if status.micro_batch_size is not None:  # runPolicy.onOutOfMemory has made it smaller
        document["training"]["microBatchSize"] = status.micro_batch_size
    return document | trained


def _between(field: str, first: Any, second: Any) -> list[Difference]:
    if isinstance(first, list) and isinstance(second, list):
        first, second = _by_name(first, second)
    if first == second:
        return []
    if isinstance(first, dict) and isinstance(second, dict):
        parts = dict.fromkeys([*first, *second])
        found = [_between(f"{field}.{part}" if field else part, first.get(part), second.get(part)) for part in parts]
        return [difference for part in found for difference in part]
    return [Difference(printable(field), shown(first), shown(second))]


def _by_name(first: list[Any], second: list[Any]) -> tuple[Any, Any]:
    """Lists of named objects, such as podTemplate.env, as maps, because their order does not matter."""
    if not all(isinstance(part, dict) and "name" in part for part in (*first, *second)):
        return first, second
    maps = [{str(part["name"]): part for part in parts} for parts in (first, second)]
    whole = [len(named) for named in maps] == [len(first), len(second)]
    return (maps[0], maps[1]) if whole else (first, second)


def shown(value: Any) -> str:
    """A value of a spec on one line."""
    if value is None:
        return ABSENT
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
