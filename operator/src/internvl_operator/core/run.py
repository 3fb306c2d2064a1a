"""Read a raw custom resource into a Run: identity, resolved spec, last recorded status."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from internvl_api.constants import ANNOTATION_ADOPT
from internvl_api.recipes.resolve import resolve
from internvl_api.run_config import RunConfig
from internvl_api.spec import InternVLFineTuneSpec, RunPolicy
from internvl_api.status import InternVLFineTuneStatus
from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster
from internvl_api.validation.policy import Policy
from internvl_api.validation.violations import SpecError
from pydantic import BaseModel, ValidationError

from internvl_operator.core.timestamps import from_text

M = TypeVar("M", bound=BaseModel)
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


Resolve = Callable[[str, str, str, InCluster], Resolved]


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
    run_policy: RunPolicy
    run_digest: str
    pod_digest: str
    status: InternVLFineTuneStatus
    raw_status: dict[str, Any] = field(repr=False)
    adopt: bool = False  # the user asks to take over orphaned children

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


def read_run(raw: dict[str, Any], resolve: Resolve | None = None, policy: Policy | None = None) -> Run:
    """The run; `resolve`: a cached `resolve_spec`; `policy`: the administrator's, by default the operator's own.

    Never raises: an invalid spec becomes `resolved.error`, and an unknown status is read in part.
    """
    metadata = raw["metadata"]
    spec, raw_status = raw.get("spec"), raw.get("status") or {}
    status = read_status(raw_status)
    job, cluster = f"{metadata['namespace']}/{metadata['name']}", InCluster.of(status, policy)
    parts = spec if isinstance(spec, dict) else {}
    return Run(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=metadata.get("resourceVersion", ""),
        generation=metadata.get("generation", 1),
        created=from_text(metadata.get("creationTimestamp")),
        deleting="deletionTimestamp" in metadata,
        resolved=(resolve or resolve_spec)(job, metadata["uid"], _canonical(spec), cluster),
        run_policy=_read_run_policy(parts.get("runPolicy")),
        run_digest=_digest({k: v for k, v in parts.items() if k not in _OWN_LIFE + _POD_PART}),
        pod_digest=_digest({k: v for k, v in parts.items() if k in _POD_PART}),
        status=status,
        raw_status=raw_status,
        adopt=(metadata.get("annotations") or {}).get(ANNOTATION_ADOPT) == "true",
    )


def read_status(raw: dict[str, Any]) -> InternVLFineTuneStatus:
    """The fields of a status that this version understands; all others have their defaults."""
    return _read_in_part(InternVLFineTuneStatus, raw)


def _read_run_policy(raw: object) -> RunPolicy:
    """The valid fields of spec.runPolicy; they apply also while the rest of the spec is invalid."""
    return _read_in_part(RunPolicy, raw if isinstance(raw, dict) else {})


def _read_in_part(model: type[M], raw: dict[str, Any]) -> M:
    known = dict(raw)
    while True:
        try:
            return model.model_validate(known)
        except ValidationError as error:
            strange = {str(problem["loc"][0]) for problem in error.errors()}
            known = {key: value for key, value in known.items() if key not in strange}


def resolve_spec(job: str, uid: str, spec_json: str, cluster: InCluster) -> Resolved:
    """The resolved spec, from its JSON text."""
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
