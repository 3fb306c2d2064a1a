"""What the operator asked of real API servers in this process: the rights it used, and the requests refused to it.

Every server that the harness starts writes an audit log; `rights` and `refusals` read all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ACCOUNT = "internvl-operator"  # of the chart, in whatever namespace
# Requests of service accounts, and whatever gives or takes their rights. Those of the cluster's own
# controllers are left out.
POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
omitManagedFields: true
rules:
  - level: Metadata
    verbs: [create, update, patch, delete, deletecollection]
    resources: [{group: rbac.authorization.k8s.io, resources: [rolebindings, clusterrolebindings]}]
  - {level: None, userGroups: ["system:serviceaccounts:kube-system"]}
  - {level: Metadata, userGroups: ["system:serviceaccounts"]}
  - {level: None}
"""
_LOGS: dict[Path, None] = {}  # of this process's servers
_DELETIONS = ("delete", "deletecollection")
Event = dict[str, Any]


class Right(NamedTuple):
    """One verb on one resource (`pods`, or `pods/log`), in a namespace or in the whole cluster."""

    group: str
    resource: str
    verb: str
    namespaced: bool


def remember(log: Path) -> None:
    """Count a server's log among those of this process."""
    _LOGS[log] = None


def forget(log: Path) -> None:
    """Leave a log out: a test refused its operator a right on purpose."""
    _LOGS.pop(log, None)


def servers() -> int:
    """Number of servers of this process that an operator asked."""
    return sum(bool(used(read(log))) for log in _LOGS)


def rights() -> set[Right]:
    """The rights that operators used on all servers of this process."""
    return {right for log in _LOGS for right in used(read(log))}


def refusals() -> list[str]:
    """Requests of operators that RBAC refused while the rights of the chart were there, one line each."""
    return [line for log in _LOGS for line in refused(read(log))]


def read(log: Path) -> Iterator[Event]:
    """The events of a log, in the order in which the requests ended."""
    if log.exists():
        with log.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.endswith("\n"))


def used(events: Iterable[Event]) -> set[Right]:
    """The rights of the operators' requests that were allowed."""
    found = set()
    for event in _of_operators(events):
        if not _forbidden(event):
            right = _right(event)
            found.add(right)
            if right.verb == "patch" and event.get("responseStatus", {}).get("code") == 201:  # applied, and created
                found.add(right._replace(verb="create"))
    return found


def refused(events: Iterable[Event]) -> list[str]:
    """The operators' requests that RBAC refused, for want of a right.

    Not those after a binding in the same place was deleted, nor those that the same account was allowed at another
    time: an API server that has just started refuses until it has read the roles.
    """
    listed = list(events)
    allowed = {_request(event) for event in _of_operators(listed) if not _forbidden(event)}
    found, gone = [], set()
    for event in listed:
        about = event.get("objectRef", {})
        if about.get("apiGroup") == "rbac.authorization.k8s.io" and not _is_operator(event):
            place = about.get("namespace", "")
            (gone.add if event["verb"] in _DELETIONS else gone.discard)(place)
        elif (
            _is_operator(event)
            and _forbidden(event)
            and not {about.get("namespace", ""), ""} & gone
            and _request(event) not in allowed
        ):
            found.append(f"{event['user']['username']}: {event['verb']} {event['requestURI']}")
    return found


def _of_operators(events: Iterable[Event]) -> Iterator[Event]:
    return (event for event in events if _is_operator(event) and "objectRef" in event)


def _is_operator(event: Event) -> bool:
    return str(event["user"]["username"]).startswith("system:serviceaccount:") and (
        event["user"]["username"].rpartition(":")[2] == ACCOUNT
    )


def _request(event: Event) -> tuple[str, str, str, str]:
    """Who asked for what: account, verb, resource, namespace."""
    about = event.get("objectRef", {})
    resource = "/".join((about.get("apiGroup", ""), about.get("resource", ""), about.get("subresource", "")))
    return event["user"]["username"], event["verb"], resource, about.get("namespace", "")


def _forbidden(event: Event) -> bool:
    """Refused by RBAC; a 403 of a quota or of a namespace that is deleted is no matter of rights."""
    return bool(event.get("annotations", {}).get("authorization.k8s.io/decision") == "forbid")


def _right(event: Event) -> Right:
    about = event["objectRef"]
    resource = "/".join(filter(None, (about.get("resource"), about.get("subresource"))))
    return Right(about.get("apiGroup", ""), resource, event["verb"], "namespace" in about)
