"""The administrator's policy: what a run may ask for its pods, with one list for each kind of thing.

A list names what is allowed. An entry that ends with `/`, `:` or `@` allows everything that begins with it. `*` allows
everything but the values that the setting reserves (`policy_rules` says which); these must be listed themselves. An
empty list allows nothing. What the operator itself puts into a pod is not checked.
"""

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from internvl_api.types import ApiModel

ANY = "*"
PREFIX_ENDS = ("/", ":", "@")


def _whole_or_prefix(entry: str) -> str:
    if ANY in entry and entry != ANY:
        raise ValueError(f"found {entry!r}, expected * alone, a whole name, or a prefix that ends with /, : or @")
    return entry


Entry = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^\S+$"), AfterValidator(_whole_or_prefix)]
Entries = Annotated[tuple[Entry, ...], Field(max_length=100)]


class Policy(ApiModel):
    """What the pods of a run may have, and which claims, queues and Secrets it may name."""

    model_config = ConfigDict(frozen=True)

    volume_types: Entries = Field(
        (
            "configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
        ),
        description="Types of volumes, and of the sources of projected volumes; * is any but hostPath",
    )  # fmt: skip
    images: Entries = Field((ANY,), description="Images of podTemplate and of its volumes")
    service_accounts: Entries = Field(("default",), description="ServiceAccounts of the pods")
    priority_classes: Entries = Field((ANY,), description="PriorityClasses of the pods; * is any but system-…")
    runtime_classes: Entries = Field((ANY,), description="RuntimeClasses of the pods")
    labels: Entries = Field(
        (ANY, "kueue.x-k8s.io/"),
        description="Keys of labels of the pods and of their ephemeral volumes; * is any key without a domain",
    )
    annotations: Entries = Field(
        (ANY, "kueue.x-k8s.io/"),
        description="Keys of annotations of the pods and of their ephemeral volumes; * is any key without a domain",
    )
    node_labels: Entries = Field(
        (ANY,), description="Labels of nodes that a run may choose; * is any but node-role.kubernetes.io/…"
    )
    affinity_namespaces: Entries = Field(
        (), description="Namespaces beside the run's in affinity to pods; (selected) is any namespaceSelector"
    )
    tolerations: Entries = Field(
        (ANY,),
        description="Taints that a run may tolerate; * is any but node-role.kubernetes.io/… and (all), which is a "
        "toleration without a key",
    )
    secrets: Entries = Field((ANY,), description="Secrets that a run may name")
    claims: Entries = Field(
        (ANY,),
        description="PersistentVolumeClaims of volumes and of pvc:// sources, and data sources of ephemeral volumes",
    )
    queues: Entries = Field((ANY,), description="Queues of kueue and volcano")
    schedulers: Entries = Field((ANY,), description="Schedulers that a run may name")
    network_profiles: Entries = Field(
        (ANY,),
        description="Network profiles of training; * is any but host and gke-tcpxo, which reach into the node",
    )
