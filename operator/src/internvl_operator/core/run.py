"""Read a raw custom resource into a Run: identity, resolved spec, last recorded status."""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from internvl_api.constants import ANNOTATION_ADOPT
from internvl_api.recipes.resolve import resolve
from internvl_api.run_config import RunConfig
from internvl_api.spec import InternVLFineTuneSpec, RunPolicy
from internvl_api.status import DefaultsStatus, InternVLFineTuneStatus
from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster
from internvl_api.validation.defaults import RunDefaults
from internvl_api.validation.policy import Policy
from internvl_api.validation.violations import SpecError
from pydantic import BaseModel, ValidationError

from internvl_operator.core.timestamps import from_text

M = TypeVar("M", bound=BaseModel)
_OWN_LIFE = ("runPolicy",)
_MARK = object()
_POD_PART = ("podTemplate", "secrets", "scheduling", "network", "tracking")


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
    defaults: DefaultsStatus | None = None  # what `resolved` has from the namespace and the cluster; None: nothing
    adopt: bool = False  # the user asks to take over orphaned children
    wanted_workers: int | None = None  # spec.workers as written, when `resolved` has fewer (policies/elastic.py)

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


def read_run(
    raw: dict[str, Any],
    resolve: Resolve | None = None,
    policy: Policy | None = None,
    gpu_memory: int | None = None,
    defaults: Callable[[InternVLFineTuneStatus], RunDefaults] | None = None,
    profile_gpus: tuple[tuple[str, int], ...] = (),
) -> Run:
    """The run; `resolve`: a cached `resolve_spec`; `policy`: the administrator's, by default the operator's own.

    `gpu_memory`: bytes of one GPU, where they are known; `defaults`: those in force with a status
    (policies/defaults_in_force.py); `profile_gpus`: see InCluster.

    Never raises: an invalid spec becomes `resolved.error`, and an unknown status is read in part.
    """
    metadata = raw["metadata"]
    spec, raw_status = raw.get("spec"), _object(raw.get("status"))
    status = read_status(raw_status)
    job, parts = f"{metadata['namespace']}/{metadata['name']}", _object(spec)
    in_force = defaults(status) if defaults else RunDefaults()
    cluster = InCluster.of(status, policy, gpu_memory, in_force, profile_gpus)
    resolved = (resolve or resolve_spec)(job, metadata["uid"], _canonical(spec), cluster)
    return Run(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=metadata.get("resourceVersion", ""),
        generation=metadata.get("generation", 1),
        created=from_text(metadata.get("creationTimestamp")),
        deleting="deletionTimestamp" in metadata,
        resolved=resolved,
        run_policy=_read_run_policy(parts.get("runPolicy")),
        run_digest=_digest({k: v for k, v in parts.items() if k not in _OWN_LIFE + _POD_PART}),
        pod_digest=_digest({k: v for k, v in parts.items() if k in _POD_PART}),
        status=status,
        raw_status=raw_status,
        defaults=_recorded(parts, resolved.spec, in_force),
        adopt=_object(metadata.get("annotations")).get(ANNOTATION_ADOPT) == "true",
    )


def _recorded(
    written: dict[str, Any], spec: InternVLFineTuneSpec | None, defaults: RunDefaults
) -> DefaultsStatus | None:
    output = spec.output if spec is not None and written.get("output") is None else None
    found = DefaultsStatus(namespace=defaults.namespace or None, cluster=defaults.cluster or None, output=output)
    return found if found.to_dict() else None


def read_status(raw: dict[str, Any]) -> InternVLFineTuneStatus:
    """The fields of a status that this version understands; all others have their defaults."""
    return _read_in_part(InternVLFineTuneStatus, raw)


def recorded_defaults(status: InternVLFineTuneStatus) -> RunDefaults:
    """The defaults that the run last used."""
    found = status.defaults or DefaultsStatus()
    return RunDefaults(found.namespace or "", found.cluster or "", found.output or "")


def _read_run_policy(raw: object) -> RunPolicy:
    """The valid fields of spec.runPolicy; they apply also while the rest of the spec is invalid."""
    return _read_in_part(RunPolicy, _object(raw))


def _object(raw: object) -> dict[str, Any]:
    return raw if isinstance(raw, dict) else {}


def _read_in_part(model: type[M], raw: dict[str, Any]) -> M:
    """The model of `raw` without what it refuses: a value, or the entry of a list or map that cannot do without it.

    A newer operator may have written a condition or a stage that this one does not know; the others still count.
    """
    known, removed = raw, True
    while removed:
        try:
            return model.model_validate(known)
        except ValidationError as error:
            known = copy.deepcopy(known) if known is raw else known
            places = [problem["loc"] for problem in error.errors(include_url=False, include_input=False)]
            removed = [place for place in places if _mark(known, place)] != []
            known = _unmarked(known)
    return model()


def _mark(node: Any, place: Sequence[int | str]) -> bool:
    """Mark the deepest part of a document that exists on the path to `place`; True when there is one."""
    if not place or not isinstance(node, dict | list):
        return False
    step: Any = place[0]
    there = step in node if isinstance(node, dict) else isinstance(step, int) and step < len(node)
    if there and not _mark(node[step], place[1:]):
        node[step] = _MARK
    return there


def _unmarked(node: Any) -> Any:
    """The document without its marked parts; they are removed together, as an index counts those before it."""
    if isinstance(node, dict):
        return {key: _unmarked(value) for key, value in node.items() if value is not _MARK}
    return [_unmarked(value) for value in node if value is not _MARK] if isinstance(node, list) else node


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
