"""Children that a run deleted with --cascade=orphan left behind: recognise, name and adopt them."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import yaml
from internvl_api.constants import (
    ANNOTATION_ADOPT,
    ANNOTATION_ADOPTED_FROM,
    ANNOTATION_RUN_DIGEST,
    LABEL_JOB,
    LABEL_JOB_UID,
    LABEL_MANAGED_BY,
    MANAGED_BY,
)

from internvl_operator.core.resources import config_map, names
from internvl_operator.core.resources.ownership import owned_metadata
from internvl_operator.core.run import Run

_SHOWN = 10  # names in a message
_REMEMBERED = 4  # uids of earlier runs
_UID = re.compile(r"[0-9A-Za-z-]{1,64}")


class Child(NamedTuple):
    """An object of the API server; `kind` as `resource_of` names it."""

    kind: str
    raw: dict[str, Any]

    @property
    def name(self) -> str:
        """metadata.name."""
        found: str = self.raw["metadata"]["name"]
        return found


def selector(run: Run) -> str:
    """The label selector of the children of all runs of this name."""
    return f"{LABEL_MANAGED_BY}={MANAGED_BY},{LABEL_JOB}={names.run_label(run.name)}"


def is_orphan(raw: dict[str, Any]) -> bool:
    """Whether a child has no owner any more."""
    return not raw["metadata"].get("ownerReferences")


def adoption(run: Run, raw: dict[str, Any]) -> dict[str, Any]:
    """A merge patch that makes the run the owner of this very object, which keeps the uids of its earlier owners."""
    metadata = raw["metadata"]
    owned = owned_metadata(run, metadata["name"], {LABEL_JOB_UID: run.uid})
    same = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
    before = [(metadata.get("labels") or {}).get(LABEL_JOB_UID, ""), *_earlier_owners(raw)]
    remembered = {ANNOTATION_ADOPTED_FROM: ",".join([uid for uid in before if uid][:_REMEMBERED])}
    changes = {key: owned[key] for key in ("labels", "ownerReferences")} | {"annotations": remembered}
    return {"metadata": same | changes}


def earlier_owners(children: Iterable[dict[str, Any]]) -> list[str]:
    """The uids of the runs to which children of a run belonged before it adopted them."""
    return sorted({uid for raw in children for uid in _earlier_owners(raw)})[:_REMEMBERED]


def _earlier_owners(raw: dict[str, Any]) -> list[str]:
    text = (raw["metadata"].get("annotations") or {}).get(ANNOTATION_ADOPTED_FROM, "")
    return [uid for uid in text.split(",") if _UID.fullmatch(uid)]


def same_output(run: Run, orphans: Sequence[Child]) -> bool:
    """Whether the orphans worked for this output: by their run.yaml, else by the pods' digest of the spec."""
    maps = [child for child in orphans if child.kind == "ConfigMap"]
    if not maps:
        pods = [child.raw["metadata"].get("annotations") or {} for child in orphans if child.kind == "Pod"]
        return all(annotations.get(ANNOTATION_RUN_DIGEST) == run.run_digest for annotations in pods)
    line = yaml.safe_dump({"output": run.spec.output}, allow_unicode=True, width=10_000).strip()
    return all(line in str((child.raw.get("data") or {}).get(config_map.KEY)).splitlines() for child in maps)


def conflict(run: Run, taken: Sequence[Child], orphans: Sequence[Child]) -> str:
    """The message about every object whose name the run needs; `taken`: those found first, `orphans`: all of them."""
    left = {(child.kind, child.name) for child in orphans}
    foreign = [child for child in taken if (child.kind, child.name) not in left]
    parts = []
    if foreign:
        one = len(foreign) == 1
        verbs = "exists and belongs" if one else "exist and belong"
        text = f"{_listed(foreign)} {verbs} to another owner, but the run needs {'its name' if one else 'their names'}"
        parts.append(f"{text}; delete {'it' if one else 'them'}, or rename the run")
    if orphans:
        parts.append(_orphaned(run, orphans))
    return "; ".join(parts)


def _orphaned(run: Run, orphans: Sequence[Child]) -> str:
    kinds = ",".join(sorted({child.kind.lower() for child in orphans}))
    uids = sorted({(child.raw["metadata"].get("labels") or {}).get(LABEL_JOB_UID, "") for child in orphans})
    place = f"-n {run.namespace}"
    text = (
        f"{_listed(orphans)}: orphaned, as an earlier run {run.name!r} was deleted with --cascade=orphan; delete them: "
        f"kubectl delete {kinds} {place} -l '{LABEL_JOB_UID} in ({', '.join(uids)})'"
    )
    if not same_output(run, orphans):
        return f"{text} (they cannot be adopted: they worked for another output than {run.spec.output})"
    return f"{text}, or adopt them: kubectl annotate ivft {run.name} {place} {ANNOTATION_ADOPT}=true"


def _listed(children: Sequence[Child]) -> str:
    shown = ", ".join(f"{child.kind} {child.name}" for child in children[:_SHOWN])
    more = len(children) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
