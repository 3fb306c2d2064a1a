"""Read a raw custom resource into a Run: identity, resolved spec, last recorded status."""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from internvl_api.recipes.resolve import resolve
from internvl_api.run_config import RunConfig
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import InternVLFineTuneStatus
from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster
from internvl_api.validation.violations import SpecError
from pydantic import ValidationError

from internvl_operator.core.timestamps import from_text

_OWN_LIFE = ("runPolicy",)
_POD_PART = ("podTemplate", "secrets", "scheduling")


class Key(NamedTuple):
    """Namespace and name of a run or another object."""

    namespace: str
    name: str


class Resolved(NamedTuple):
    """A resolved spec. Without `spec` it cannot run; with both, only this cluster refuses it."""

    spec: InternVLFineTuneSpec | None
    run_config: RunConfig | None
    run_yaml: str
    error: SpecError | None


@dataclass(frozen=True)
class Run:
    """One InternVLFineTune. The digests cover the spec as written, so that an operator upgrade changes neither."""

    namespace: str
    name: str
    uid: str
    version: str
    generation: int
    created: datetime | None
    deleting: bool
    resolved: Resolved
    run_digest: str
    pod_digest: str
    status: InternVLFineTuneStatus
    raw_status: dict[str, Any] = field(repr=False)

    @property
    def spec(self) -> InternVLFineTuneSpec:
        """The parsed spec. Raises SpecError when it is invalid."""
        if self.resolved.spec is None:
            raise self.resolved.error or ValueError("neither spec nor error")
        return self.resolved.spec

    @property
    def mistake(self) -> SpecError | None:
        """Why the spec cannot be run, or not any more."""
        return self.resolved.error


def read_run(raw: dict[str, Any]) -> Run:
    """The run. Never raises: an invalid spec becomes `resolved.error`, and an unknown status is read in part."""
    metadata = raw["metadata"]
    spec, raw_status = raw.get("spec"), raw.get("status") or {}
    status = read_status(raw_status)
    job = f"{metadata['namespace']}/{metadata['name']}"
    parts = spec if isinstance(spec, dict) else {}
    return Run(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=metadata.get("resourceVersion", ""),
        generation=metadata.get("generation", 1),
        created=from_text(metadata.get("creationTimestamp")),
        deleting="deletionTimestamp" in metadata,
        resolved=_resolve(job, metadata["uid"], _canonical(spec), InCluster.of(status)),
        run_digest=_digest({k: v for k, v in parts.items() if k not in _OWN_LIFE + _POD_PART}),
        pod_digest=_digest({k: v for k, v in parts.items() if k in _POD_PART}),
        status=status,
        raw_status=raw_status,
    )


def read_status(raw: dict[str, Any]) -> InternVLFineTuneStatus:
    """The fields of a status that this version understands; all others have their defaults."""
    known = dict(raw)
    while True:
        try:
            return InternVLFineTuneStatus.model_validate(known)
        except ValidationError as error:
            strange = {str(problem["loc"][0]) for problem in error.errors()}
            known = {key: value for key, value in known.items() if key not in strange}


# Resolving reads a recipe and renders YAML (milliseconds); a run has many passes between two edits.
@lru_cache(maxsize=2048)
def _resolve(job: str, uid: str, spec_json: str, cluster: InCluster) -> Resolved:
    spec, violations = check_spec(json.loads(spec_json), cluster)
    error = SpecError(*violations) if violations else None
    if spec is None:
        return Resolved(None, None, "", error)
    run_config = resolve(spec, job=job, job_uid=uid)
    return Resolved(spec, run_config, run_config.to_yaml(reveal=True), error)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(value: object) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()
