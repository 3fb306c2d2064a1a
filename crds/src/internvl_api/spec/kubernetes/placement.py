"""Where a pod may run: tolerations, and affinity to nodes and other pods."""

from typing import Annotated, Literal, Required

from pydantic import Field
from typing_extensions import TypedDict

from internvl_api.spec.kubernetes.part import LabelValue, Name, QualifiedName, part

_SetOperator = Literal["In", "NotIn", "Exists", "DoesNotExist"]
_Weight = Annotated[int, Field(ge=1, le=100, description="Weight from 1 to 100; larger counts more")]
_LabelKeys = Annotated[list[QualifiedName], Field(max_length=20)]


@part
class Toleration(TypedDict, total=False):
    """A taint of nodes that the pods tolerate."""

    key: Annotated[str, Field(max_length=317, description="Key of the taint; default: every taint")]
    operator: Annotated[
        Literal["Exists", "Equal", "Lt", "Gt", ""], Field(description="How to compare the value; default Equal")
    ]
    value: Annotated[str, Field(max_length=63, description="Value of the taint, for Equal, Lt and Gt")]
    effect: Annotated[
        Literal["NoSchedule", "PreferNoSchedule", "NoExecute", ""],
        Field(description="Effect of the taint; default: every effect"),
    ]
    tolerationSeconds: Annotated[
        int, Field(description="Seconds that a pod stays on its node after a NoExecute taint; default: forever")
    ]


@part
class LabelRequirement(TypedDict, total=False):
    """A condition on one label."""

    key: Annotated[Required[QualifiedName], Field(description="Key of the label")]
    operator: Annotated[Required[_SetOperator], Field(description="Relation of the label to the values")]
    values: Annotated[list[LabelValue], Field(max_length=200, description="Values for In and NotIn")]


@part
class LabelSelector(TypedDict, total=False):
    """Objects with labels that meet every condition."""

    matchLabels: Annotated[dict[str, LabelValue], Field(max_length=50, description="Labels with exact values")]
    matchExpressions: Annotated[list[LabelRequirement], Field(max_length=50, description="Conditions on labels")]


@part
class NodeRequirement(TypedDict, total=False):
    """A condition on one label or field of a node."""

    key: Annotated[Required[QualifiedName], Field(description="Key of the label, or metadata.name")]
    operator: Annotated[
        Required[Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]],
        Field(description="Relation of the label or field to the values"),
    ]
    values: Annotated[
        list[Annotated[str, Field(max_length=253)]],
        Field(max_length=1000, description="Values for In and NotIn; one number for Gt and Lt"),
    ]


@part
class NodeTerm(TypedDict, total=False):
    """Nodes that meet every condition."""

    matchExpressions: Annotated[list[NodeRequirement], Field(max_length=50, description="Conditions on labels")]
    matchFields: Annotated[list[NodeRequirement], Field(max_length=10, description="Conditions on metadata.name")]


@part
class NodeSelector(TypedDict, total=False):
    """Nodes that at least one term selects."""

    nodeSelectorTerms: Annotated[Required[list[NodeTerm]], Field(max_length=50, description="Alternatives")]


@part
class PreferredNodes(TypedDict, total=False):
    """Nodes to prefer."""

    weight: Required[_Weight]
    preference: Annotated[Required[NodeTerm], Field(description="Nodes to prefer")]


@part
class NodeAffinity(TypedDict, total=False):
    """Nodes that the pods must have or prefer."""

    requiredDuringSchedulingIgnoredDuringExecution: Annotated[
        NodeSelector, Field(description="Nodes that a pod may be placed on")
    ]
    preferredDuringSchedulingIgnoredDuringExecution: Annotated[
        list[PreferredNodes], Field(max_length=50, description="Nodes that a pod is placed on where possible")
    ]


@part
class PodTerm(TypedDict, total=False):
    """Pods, and the topology (such as a node or zone) to share with them or not."""

    topologyKey: Annotated[
        Required[QualifiedName], Field(description="Label of nodes whose equal values are one topology")
    ]
    labelSelector: Annotated[LabelSelector, Field(description="Pods to look for")]
    namespaces: Annotated[list[Name], Field(max_length=50, description="Namespaces of these pods; default: the run's")]
    namespaceSelector: Annotated[LabelSelector, Field(description="More namespaces of these pods, by labels")]
    matchLabelKeys: Annotated[_LabelKeys, Field(description="Labels in which these pods equal the run's")]
    mismatchLabelKeys: Annotated[_LabelKeys, Field(description="Labels in which these pods differ from the run's")]


@part
class PreferredPods(TypedDict, total=False):
    """Pods to be near to, or away from, where possible."""

    weight: Required[_Weight]
    podAffinityTerm: Annotated[Required[PodTerm], Field(description="Pods and topology")]


@part
class PodAffinity(TypedDict, total=False):
    """Other pods that matter for where a pod is placed."""

    requiredDuringSchedulingIgnoredDuringExecution: Annotated[
        list[PodTerm], Field(max_length=20, description="Terms that must hold")
    ]
    preferredDuringSchedulingIgnoredDuringExecution: Annotated[
        list[PreferredPods], Field(max_length=20, description="Terms that hold where possible")
    ]


@part
class Affinity(TypedDict, total=False):
    """Affinity of the pods to nodes and to other pods."""

    nodeAffinity: Annotated[NodeAffinity, Field(description="Nodes that the pods must have or prefer")]
    podAffinity: Annotated[PodAffinity, Field(description="Pods to be near to")]
    podAntiAffinity: Annotated[PodAffinity, Field(description="Pods to be away from")]
