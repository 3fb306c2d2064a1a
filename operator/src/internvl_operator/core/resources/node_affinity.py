"""Exclude nodes in the affinity of a pod."""

from collections.abc import Mapping, Sequence
from typing import Any

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
Affinity = Mapping[str, Any]


def without(affinity: Affinity | None, nodes: Sequence[str]) -> Affinity | None:
    """The affinity, with these nodes excluded from each of its alternatives.

    Matches the nodes' names, because the label kubernetes.io/hostname may differ.
    """
    if not nodes:
        return affinity
    excluded = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    given = affinity or {}
    rules = given.get("nodeAffinity") or {}
    terms = (rules.get(_REQUIRED) or {}).get("nodeSelectorTerms") or [{}]
    terms = [{**term, "matchFields": [*(term.get("matchFields") or ()), *excluded]} for term in terms]
    return {**given, "nodeAffinity": {**rules, _REQUIRED: {"nodeSelectorTerms": terms}}}
