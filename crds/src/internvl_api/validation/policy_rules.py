"""The rules of the administrator's policy: one for each setting, with its check in Python and in CEL.

The operator and its webhook use the Python, the chart's ValidatingAdmissionPolicy the CEL, which
`internvl_api.admission_policy` writes. A rule has the paths of the values that its setting decides; `policy_paths`
reads them in both languages. tests/api/test_policy.py compares the two languages.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.alias_generators import to_snake

from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.validation.policy import ANY, PREFIX_ENDS, Policy
from internvl_api.validation.policy_paths import refused_at, steps_of, values_at
from internvl_api.validation.violations import Violation

ALL_TAINTS = "(all)"  # a toleration without a key
_NEXT_STEP = "change it, or ask the cluster's administrator, who sets policy.{setting} of the operator's chart"
_SHOWN = 1000  # characters of the values found; the API server limits messages to 5 KiB as well
SELECTED = "(selected)"  # namespaces that a selector chooses
_CLAIM = "podTemplate.volumes.[].ephemeral.volumeClaimTemplate.metadata"
_NODES = "podTemplate.affinity.nodeAffinity"
_EPHEMERAL = "podTemplate.volumes.[].ephemeral.volumeClaimTemplate.spec"


@dataclass(frozen=True)
class Reserved:
    """Values that `*` leaves out, so that they must be listed themselves.

    Attributes:
        rest: what `*` stands for, in messages.
        names: whole values.
        prefixes: what reserved values begin with.
        part: a text that reserved values contain.
    """

    rest: str = "any"
    names: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    part: str = ""

    def has(self, value: str) -> bool:
        """Whether `*` leaves the value out."""
        return value in self.names or value.startswith(self.prefixes) or bool(self.part and self.part in value)

    def cel(self, value: str) -> str:
        """CEL that is true when `*` leaves the value out; `value` is CEL."""
        tests = [f"{value} == '{name}'" for name in self.names]
        tests += [f"{value}.startsWith('{prefix}')" for prefix in self.prefixes]
        tests += [f"{value}.contains('{self.part}')"] if self.part else []
        return " || ".join(tests)


@dataclass(frozen=True)
class PolicyRule:
    """What one setting of the policy decides.

    Attributes:
        setting: the setting's name in the chart's values, below `policy`.
        reason: the Stalled condition's reason.
        field: the field that messages name.
        paths: where the values stand, in the language of `policy_paths`.
        reserved: values that `*` leaves out.
        free: values that ask for nothing, so that no list decides them.
    """

    setting: str
    reason: str
    field: str
    paths: tuple[str, ...]
    reserved: Reserved = Reserved()
    free: tuple[str, ...] = ()

    def violation(self, spec: dict[str, Any], policy: Policy) -> Violation | None:
        """The violation of a spec in JSON; None when the policy allows everything that the spec has."""
        entries: tuple[str, ...] = getattr(policy, to_snake(self.setting))
        found = [v for path in self.paths for v in values_at(path, spec) if not self._allows(entries, v)]
        if not found:
            return None
        allowed = ", ".join(self.reserved.rest if entry == ANY else entry for entry in entries)
        return Violation(self.field, self._message(_shortened(", ".join(found)), allowed or "none"), self.reason)

    def found_cel(self) -> str:
        """CEL of the list of values that the policy refuses."""
        return " + ".join(refused_at(path, self._refuses_cel) for path in self.paths)

    def message_cel(self, found: str) -> str:
        """CEL of the violation's message; `found`: CEL of the refused values."""
        entries = f"variables.{self.setting}"
        allowed = f"{entries}.map(entry, entry == '{ANY}' ? '{self.reserved.rest}' : entry).join(', ')"
        text = f'"{self.field}: {self._message("{0}", "{1}")}"'
        text = text.replace("{0}", f'" + {found}.join(", ") + "')
        return text.replace("{1}", f'" + (size({entries}) > 0 ? {allowed} : "none") + "')

    def _message(self, found: str, allowed: str) -> str:
        next_step = _NEXT_STEP.format(setting=self.setting)
        return f"found {found}, which the policy of this cluster does not allow (allowed: {allowed}); {next_step}"

    def _allows(self, entries: tuple[str, ...], value: str) -> bool:
        return value in self.free or any(
            value == entry
            or (entry == ANY and not self.reserved.has(value))
            or (entry.endswith(PREFIX_ENDS) and value.startswith(entry))
            for entry in entries
        )

    def _refuses_cel(self, value: str) -> str:
        ends = " || ".join(f"entry.endsWith('{end}')" for end in PREFIX_ENDS)
        reserved = self.reserved.cel(value)
        rest = f"entry == '{ANY}'" + (f" && !({reserved})" if reserved else "")
        listed = f"{value} == entry || ({rest}) || (({ends}) && {value}.startsWith(entry))"
        asks = "".join(f"{value} != '{free}' && " for free in self.free)
        return f"{asks}!variables.{self.setting}.exists(entry, {listed})"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _terms_of_pod_affinity() -> Iterator[str]:
    for kind in ("podAffinity", "podAntiAffinity"):
        affinity = f"podTemplate.affinity.{kind}"
        yield f"{affinity}.requiredDuringSchedulingIgnoredDuringExecution.[]"
        yield f"{affinity}.preferredDuringSchedulingIgnoredDuringExecution.[].podAffinityTerm"


_SOURCES = (
    "model.source",
    "model.adapter",
    "data.meta",
    "data.metaRoot",
    "data.validationMeta",
    *(
        f"data.{datasets}.{{values}}.{part}"
        for datasets in ("train", "validation")
        for part in ("annotation", "questions", "root")
    ),
    *(f"evaluation.tasks.{{values}}.{part}" for part in ("annotation", "root")),
)
_DOMAINS = Reserved("any key without a domain", part="/")
_CONTROL_PLANE = ("node-role.kubernetes.io/",)
RULES = (
    PolicyRule(
        "volumeTypes",
        "VolumeTypeNotAllowed",
        "spec.podTemplate.volumes",
        ("podTemplate.volumes.[].{types}", "podTemplate.volumes.[].projected.sources.[].{types}"),
        Reserved("any but hostPath", names=("hostPath",)),
    ),
    PolicyRule(
        "images",
        "ImageNotAllowed",
        "spec.podTemplate.image",
        ("podTemplate.image", "podTemplate.volumes.[].image.reference"),
    ),
    PolicyRule(
        "serviceAccounts",
        "ServiceAccountNotAllowed",
        "spec.podTemplate.serviceAccountName",
        ("podTemplate.serviceAccountName",),
    ),
    PolicyRule(
        "priorityClasses",
        "PriorityClassNotAllowed",
        "spec.podTemplate.priorityClassName",
        ("podTemplate.priorityClassName", "podTemplate.labels.'kueue.x-k8s.io/priority-class'"),
        Reserved("any without the prefix system-", prefixes=("system-",)),
    ),
    PolicyRule(
        "runtimeClasses",
        "RuntimeClassNotAllowed",
        "spec.podTemplate.runtimeClassName",
        ("podTemplate.runtimeClassName",),
    ),
    PolicyRule(
        "labels",
        "LabelNotAllowed",
        "spec.podTemplate.labels",
        ("podTemplate.labels.{keys}", f"{_CLAIM}.labels.{{keys}}"),
        _DOMAINS,
    ),
    PolicyRule(
        "annotations",
        "AnnotationNotAllowed",
        "spec.podTemplate.annotations",
        ("podTemplate.annotations.{keys}", f"{_CLAIM}.annotations.{{keys}}"),
        _DOMAINS,
    ),
    PolicyRule(
        "nodeLabels",
        "NodeLabelNotAllowed",
        "spec.podTemplate",
        (
            "podTemplate.nodeSelector.{keys}",
            "podTemplate.cpuNodeSelector.{keys}",
            f"{_NODES}.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms.[].matchExpressions.[chosen].key",
            f"{_NODES}.preferredDuringSchedulingIgnoredDuringExecution.[].preference.matchExpressions.[chosen].key",
        ),
        Reserved(f"any without the prefix {_CONTROL_PLANE[0]}", prefixes=_CONTROL_PLANE),
    ),
    PolicyRule(
        "affinityNamespaces",
        "AffinityNamespaceNotAllowed",
        "spec.podTemplate.affinity",
        tuple(
            f"{term}.{step}"
            for term in _terms_of_pod_affinity()
            for step in ("namespaces.[]", f"namespaceSelector={SELECTED}")
        ),
        Reserved("any namespace by name", names=(SELECTED,)),
    ),
    PolicyRule(
        "tolerations",
        "TolerationNotAllowed",
        "spec.podTemplate.tolerations",
        (f"podTemplate.tolerations.[].key:{ALL_TAINTS}",),
        Reserved(f"any key without the prefix {_CONTROL_PLANE[0]}", names=(ALL_TAINTS,), prefixes=_CONTROL_PLANE),
    ),
    PolicyRule(
        "secrets",
        "SecretNotAllowed",
        "spec.secrets, spec.podTemplate",
        (
            "secrets.*",
            "podTemplate.env.[].valueFrom.secretKeyRef.name",
            "podTemplate.imagePullSecrets.[].name",
            "podTemplate.volumes.[].*.secretName",
            "podTemplate.volumes.[].*.secretRef.name",
            "podTemplate.volumes.[].*.nodePublishSecretRef.name",
            "podTemplate.volumes.[].projected.sources.[].secret.name",
        ),
    ),
    PolicyRule(
        "claims",
        "ClaimNotAllowed",
        "spec.podTemplate.volumes, spec.model, spec.data, spec.evaluation",
        (
            "podTemplate.volumes.[].persistentVolumeClaim.claimName",
            f"{_EPHEMERAL}.dataSource.name",
            f"{_EPHEMERAL}.dataSourceRef.name",
            *(f"{path}.{{claim}}" for path in _SOURCES),
        ),
    ),
    PolicyRule(
        "queues",
        "QueueNotAllowed",
        "spec.scheduling.queue",
        (
            "scheduling.queue",
            "podTemplate.labels.'kueue.x-k8s.io/queue-name'",
            "podTemplate.annotations.'kueue.x-k8s.io/queue-name'",  # kueue reads it where the label is absent
            "podTemplate.annotations.'scheduling.volcano.sh/queue-name'",
        ),
    ),
    PolicyRule(
        "schedulers",
        "SchedulerNotAllowed",
        "spec.scheduling.schedulerName",
        ("scheduling.schedulerName",),
    ),
    PolicyRule(
        "networkProfiles",
        "NetworkProfileNotAllowed",
        "spec.network.profile",
        ("network.profile",),
        Reserved("any but host and gke-tcpxo", names=("host", "gke-tcpxo")),
        free=("none",),
    ),
)


SECTIONS = tuple(sorted({steps_of(path)[0] for rule in RULES for path in rule.paths}))
"""The sections of a spec that the rules read."""


def violations(spec: InternVLFineTuneSpec, policy: Policy) -> Iterator[Violation]:
    """What the policy refuses of a spec, one violation for each setting."""
    written = {name: getattr(spec, to_snake(name)).to_dict() for name in SECTIONS}
    found = (rule.violation(written, policy) for rule in RULES)
    return (each for each in found if each is not None)
