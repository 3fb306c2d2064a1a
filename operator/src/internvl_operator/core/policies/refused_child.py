"""Say why the API server refuses a child: which quota or LimitRange, and which setting of the run to change."""

import re

from internvl_operator.core.resources import requirements

_QUOTA_FULL = re.compile(r"exceeded quota: (?P<quota>[^\s,]+)(?:, requested: (?P<requested>.*?), used: )?")
_QUOTA_UNMET = re.compile(r"failed quota: (?P<quota>[^\s:]+): must specify (?P<names>.*)")
_LIMIT_RANGE = re.compile(
    r"(maximum|minimum) \S+ usage per (Container|Pod)|max limit to request ratio per (Container|Pod)"
    r"|must be less than or equal to \S+ limit"
)
# A pod names an object that is missing; the fields of the spec that name it.
_MISSING = (
    (re.compile(r"error looking up service account|serviceaccount \S+ not found"), "serviceAccountName"),
    (re.compile(r"no PriorityClass with name"), "priorityClassName"),
    (re.compile(r"RuntimeClass \S+ not found"), "runtimeClassName"),
)
_EXTENDED = re.compile(r"\brequests\.[^\s=,]+/")  # GPUs, under whichever name


def refusal_reason(
    name: str, stage: str | None, namespace: str, status: int, reason: str, message: str
) -> tuple[str, str]:
    """Reason and message for a condition.

    `name`: kind and name of the child; `stage`: of a pod, else None. `status`, `reason` and `message` are the server's.
    """
    text = f"the API server refuses {name}: {message}"
    if found := _QUOTA_FULL.search(message):
        quota = f"ResourceQuota {found['quota']!r} of namespace {namespace!r}"
        return (
            "QuotaExceeded",
            f"{text}; {quota} has no room: raise it, end other pods, or {_request_less(stage, found['requested'])}",
        )
    setting = requirements.setting(stage) if stage else "spec.podTemplate"
    if found := _QUOTA_UNMET.search(message):
        names = ", ".join(dict.fromkeys(re.findall(r"(?:limits|requests)\.[a-z-]+", found["names"]))) or "all resources"
        quota = f"ResourceQuota {found['quota']!r} of namespace {namespace!r}"
        return "ResourcesMissing", f"{text}; {quota} admits only pods that state {names}: set {setting}"
    if _LIMIT_RANGE.search(message):
        ranges = f"a LimitRange of namespace {namespace!r} (kubectl get limitrange -n {namespace})"
        return "LimitRangeViolated", f"{text}; {ranges} bounds each pod: set requests and limits in {setting}"
    for pattern, field in _MISSING:
        if pattern.search(message):
            return "ForbiddenChild", f"{text}; create that object, or correct spec.podTemplate.{field}"
    return ("NameTaken" if status == 409 else f"{reason or 'Invalid'}Child"), text


def _request_less(stage: str | None, requested: str | None) -> str:
    """The advice to request less; GPUs and the number of pods have fields of their own."""
    if stage is None:
        return "ask its administrator"
    workers = "spec.data.preflight.workers" if stage == "preflight" else "spec.workers"
    if requested and _EXTENDED.search(requested):
        return f"lower {workers} or spec.gpusPerWorker"
    if requested and all(part.strip().startswith(("pods=", "count/pods=")) for part in requested.split(",")):
        return f"lower {workers}"
    setting = requirements.setting(stage)
    return f"lower {workers} or {setting}" if stage == "preflight" else f"lower {setting}"
