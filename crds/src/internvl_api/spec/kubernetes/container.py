"""The parts of a container: environment variables, mounts and resources."""

from typing import Annotated, Literal, Required

from pydantic import Field
from typing_extensions import TypedDict

from internvl_api.spec.kubernetes.part import Key, Name, Path, Quantities, Quantity, part

ENV_NAME_PATTERN = r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"
MAX_VALUE = 32_768


@part
class KeyRef(TypedDict, total=False):
    """One key of a ConfigMap or Secret in the run's namespace."""

    name: Annotated[Required[Name], Field(description="Name of the object")]
    key: Annotated[Required[Key], Field(description="Key in the object")]
    optional: Annotated[bool, Field(description="true: start the pod also without the object or the key")]


@part
class FieldRef(TypedDict, total=False):
    """One field of the pod."""

    apiVersion: Annotated[str, Field(max_length=63, description="Version of the path; default v1")]
    fieldPath: Annotated[
        Required[str], Field(min_length=1, max_length=512, description="Path of the field, such as spec.nodeName")
    ]


@part
class ResourceFieldRef(TypedDict, total=False):
    """One request or limit of a container."""

    containerName: Annotated[str, Field(max_length=63, description="Name of the container; required in volumes")]
    resource: Annotated[
        Required[str], Field(min_length=1, max_length=317, description="What to read, such as limits.memory")
    ]
    divisor: Annotated[Quantity, Field(description="Unit of the result, such as 1Mi; default 1")]


@part
class EnvSource(TypedDict, total=False):
    """Where a variable's value comes from; set exactly one."""

    configMapKeyRef: Annotated[KeyRef, Field(description="Key of a ConfigMap in the run's namespace")]
    secretKeyRef: Annotated[KeyRef, Field(description="Key of a Secret in the run's namespace")]
    fieldRef: Annotated[FieldRef, Field(description="Field of the pod")]
    resourceFieldRef: Annotated[ResourceFieldRef, Field(description="Request or limit of a container")]


@part
class EnvVar(TypedDict, total=False):
    """One environment variable, with either `value` or `valueFrom`."""

    name: Annotated[
        Required[str],
        Field(min_length=1, max_length=1024, pattern=ENV_NAME_PATTERN, description="Name of the variable"),
    ]
    value: Annotated[str, Field(max_length=MAX_VALUE, description="Value of the variable; not for secrets")]
    valueFrom: Annotated[EnvSource, Field(description="Where the value comes from, instead of `value`")]


@part
class VolumeMount(TypedDict, total=False):
    """Where the trainer's container sees a volume."""

    name: Annotated[
        Required[str], Field(min_length=1, max_length=63, description="Name of a volume in podTemplate.volumes")
    ]
    mountPath: Annotated[Required[Path], Field(description="Absolute path in the container")]
    subPath: Annotated[str, Field(max_length=4096, description="Folder of the volume to mount; default: all of it")]
    subPathExpr: Annotated[str, Field(max_length=4096, description="subPath with variables, as $(NAME)")]
    readOnly: Annotated[bool, Field(description="true: the container cannot write")]
    recursiveReadOnly: Annotated[
        Literal["Disabled", "IfPossible", "Enabled"],
        Field(description="Whether readOnly also holds for mounts below this one"),
    ]
    mountPropagation: Annotated[
        Literal["None", "HostToContainer", "Bidirectional"],
        Field(description="Whether later mounts of the node appear in the container, or the reverse"),
    ]


@part
class ResourceClaim(TypedDict, total=False):
    """A device of the pod's resource claims."""

    name: Annotated[Required[Name], Field(description="Name of the claim in the pod")]
    request: Annotated[str, Field(max_length=253, description="Request of the claim; default: all of it")]


@part
class Resources(TypedDict, total=False):
    """What a container requests, and what it may use at most."""

    limits: Annotated[Quantities, Field(description="Maximum by resource, such as {memory: 64Gi}")]
    requests: Annotated[Quantities, Field(description="Minimum by resource; default: the limit")]
    claims: Annotated[list[ResourceClaim], Field(max_length=20, description="Devices of the pod's resource claims")]


@part
class PullSecret(TypedDict, total=False):
    """A Secret with the credentials of an image registry."""

    name: Annotated[Required[Name], Field(description="Name of a Secret in the run's namespace")]
