"""The kinds of volume that a training pod needs."""

from typing import Annotated, Literal, Required

from pydantic import Field
from typing_extensions import TypedDict

from internvl_api.spec.kubernetes.container import FieldRef, PullSecret, ResourceFieldRef
from internvl_api.spec.kubernetes.part import Key, Name, Path, Quantities, Quantity, part
from internvl_api.spec.kubernetes.placement import LabelSelector

_Mode = Annotated[int, Field(ge=0, le=0o777)]
_FsType = Annotated[str, Field(max_length=63, description="File system, such as ext4; default: the driver's")]
_Optional = Annotated[bool, Field(description="true: start the pod also without the object or the keys")]
_DefaultMode = Annotated[_Mode, Field(description="Permissions of the files, such as 0644; default 0644")]
_ReadOnly = Annotated[bool, Field(description="true: the pod cannot write")]


@part
class KeyToPath(TypedDict, total=False):
    """A key of a ConfigMap or Secret as a file."""

    key: Annotated[Required[Key], Field(description="Key in the object")]
    path: Annotated[Required[Path], Field(description="Path of the file, relative to the volume")]
    mode: Annotated[_Mode, Field(description="Permissions of the file; default: defaultMode")]


_Items = Annotated[list[KeyToPath], Field(max_length=100, description="Keys and their files; default: every key")]


@part
class EmptyDir(TypedDict, total=False):
    """An empty folder that lives as long as the pod."""

    medium: Annotated[str, Field(max_length=63, description="Memory: a tmpfs; default: the node's disk")]
    sizeLimit: Annotated[Quantity, Field(description="Maximum size; a pod that exceeds it is evicted")]


@part
class ClaimRef(TypedDict, total=False):
    """A PersistentVolumeClaim of the run's namespace."""

    claimName: Annotated[Required[Name], Field(description="Name of the claim")]
    readOnly: _ReadOnly


@part
class ConfigMapVolume(TypedDict, total=False):
    """The keys of a ConfigMap as files."""

    name: Annotated[Required[Name], Field(description="Name of the ConfigMap")]
    items: _Items
    defaultMode: _DefaultMode
    optional: _Optional


@part
class SecretVolume(TypedDict, total=False):
    """The keys of a Secret as files."""

    secretName: Annotated[Required[Name], Field(description="Name of the Secret")]
    items: _Items
    defaultMode: _DefaultMode
    optional: _Optional


@part
class DownwardFile(TypedDict, total=False):
    """A field of the pod as a file."""

    path: Annotated[Required[Path], Field(description="Path of the file, relative to the volume")]
    fieldRef: Annotated[FieldRef, Field(description="Field of the pod")]
    resourceFieldRef: Annotated[ResourceFieldRef, Field(description="Request or limit of a container")]
    mode: Annotated[_Mode, Field(description="Permissions of the file; default: defaultMode")]


_DownwardItems = Annotated[list[DownwardFile], Field(max_length=100, description="Fields and their files")]


@part
class DownwardVolume(TypedDict, total=False):
    """Fields of the pod as files."""

    items: _DownwardItems
    defaultMode: _DefaultMode


@part
class ProjectedObject(TypedDict, total=False):
    """The keys of a ConfigMap or Secret as files of a projected volume."""

    name: Annotated[Required[Name], Field(description="Name of the object")]
    items: _Items
    optional: _Optional


@part
class ProjectedFields(TypedDict, total=False):
    """Fields of the pod as files of a projected volume."""

    items: _DownwardItems


@part
class ServiceAccountToken(TypedDict, total=False):
    """A token of the pod's ServiceAccount as a file; the kubelet renews it."""

    audience: Annotated[str, Field(max_length=1024, description="Who the token is for; default: the API server")]
    expirationSeconds: Annotated[int, Field(ge=600, description="Life time of the token in seconds; default 3600")]
    path: Annotated[Required[Path], Field(description="Path of the file, relative to the volume")]


@part
class TrustBundle(TypedDict, total=False):
    """Certificates of ClusterTrustBundles as a file."""

    name: Annotated[str, Field(max_length=253, description="Name of one ClusterTrustBundle")]
    signerName: Annotated[str, Field(max_length=571, description="Signer whose bundles are taken, instead of name")]
    labelSelector: Annotated[LabelSelector, Field(description="Bundles of the signer to take; default: none")]
    optional: _Optional
    path: Annotated[Required[Path], Field(description="Path of the file, relative to the volume")]


@part
class Projection(TypedDict, total=False):
    """One source of a projected volume; set exactly one."""

    serviceAccountToken: Annotated[ServiceAccountToken, Field(description="Token of the pod's ServiceAccount")]
    configMap: Annotated[ProjectedObject, Field(description="Keys of a ConfigMap")]
    secret: Annotated[ProjectedObject, Field(description="Keys of a Secret")]
    downwardAPI: Annotated[ProjectedFields, Field(description="Fields of the pod")]
    clusterTrustBundle: Annotated[TrustBundle, Field(description="Certificates of ClusterTrustBundles")]


@part
class ProjectedVolume(TypedDict, total=False):
    """Several sources in one folder."""

    sources: Annotated[list[Projection], Field(max_length=50, description="What the folder contains")]
    defaultMode: _DefaultMode


@part
class CsiVolume(TypedDict, total=False):
    """A volume that a CSI driver makes for the pod."""

    driver: Annotated[Required[Name], Field(description="Name of the driver")]
    fsType: _FsType
    readOnly: _ReadOnly
    volumeAttributes: Annotated[
        dict[str, Annotated[str, Field(max_length=4096)]],
        Field(max_length=50, description="Settings of the driver"),
    ]
    nodePublishSecretRef: Annotated[PullSecret, Field(description="Secret that the driver needs")]


@part
class ClaimMetadata(TypedDict, total=False):
    """Labels and annotations of a claim."""

    labels: Annotated[
        dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=50, description="Labels of the claim")
    ]
    annotations: Annotated[
        dict[str, Annotated[str, Field(max_length=4096)]],
        Field(max_length=50, description="Annotations of the claim"),
    ]


@part
class DataSource(TypedDict, total=False):
    """An object whose contents a new volume begins with."""

    apiGroup: Annotated[str, Field(max_length=253, description="API group of the object")]
    kind: Annotated[Required[str], Field(min_length=1, max_length=63, description="Kind of the object")]
    name: Annotated[Required[Name], Field(description="Name of the object")]
    namespace: Annotated[str, Field(max_length=63, description="Namespace of the object; default: the run's")]


@part
class VolumeResources(TypedDict, total=False):
    """The size of a volume."""

    requests: Annotated[Quantities, Field(description="Minimum size, as {storage: 100Gi}")]
    limits: Annotated[Quantities, Field(description="Maximum size, as {storage: 200Gi}")]


@part
class ClaimSpec(TypedDict, total=False):
    """The volume that a claim asks for."""

    accessModes: Annotated[
        list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]],
        Field(max_length=4, description="Ways in which nodes may mount the volume"),
    ]
    resources: Annotated[VolumeResources, Field(description="Size of the volume")]
    storageClassName: Annotated[str, Field(max_length=253, description="StorageClass; default: the cluster's")]
    volumeAttributesClassName: Annotated[str, Field(max_length=253, description="VolumeAttributesClass")]
    volumeMode: Annotated[Literal["Filesystem", "Block"], Field(description="Kind of the volume; default Filesystem")]
    volumeName: Annotated[str, Field(max_length=253, description="Name of one PersistentVolume")]
    selector: Annotated[LabelSelector, Field(description="PersistentVolumes to choose from")]
    dataSource: Annotated[DataSource, Field(description="Snapshot or claim that the volume begins with")]
    dataSourceRef: Annotated[DataSource, Field(description="Any object that the volume begins with")]


@part
class ClaimTemplate(TypedDict, total=False):
    """A PersistentVolumeClaim to make for each pod."""

    metadata: Annotated[ClaimMetadata, Field(description="Labels and annotations of the claim")]
    spec: Annotated[Required[ClaimSpec], Field(description="The volume that the claim asks for")]


@part
class EphemeralVolume(TypedDict, total=False):
    """A volume of a StorageClass that lives as long as the pod."""

    volumeClaimTemplate: Annotated[Required[ClaimTemplate], Field(description="Claim to make for each pod")]


@part
class HostPath(TypedDict, total=False):
    """A file or folder of the node. Pod Security baseline and restricted refuse it."""

    path: Annotated[Required[Path], Field(description="Path on the node")]
    type: Annotated[
        Literal[
            "", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"
        ],
        Field(description="What must be at the path; default: nothing is checked"),
    ]  # fmt: skip


@part
class Nfs(TypedDict, total=False):
    """A folder of an NFS server."""

    server: Annotated[Required[str], Field(min_length=1, max_length=253, description="Host name or IP address")]
    path: Annotated[Required[Path], Field(description="Exported path")]
    readOnly: _ReadOnly


@part
class ImageVolume(TypedDict, total=False):
    """The contents of an OCI image or artifact, read-only."""

    reference: Annotated[str, Field(max_length=1024, description="The image, as in podTemplate.image")]
    pullPolicy: Annotated[
        Literal["Always", "Never", "IfNotPresent"],
        Field(description="When to pull; default: Always for latest, else IfNotPresent"),
    ]


@part
class Volume(TypedDict, total=False):
    """A volume of the pods, of exactly one kind."""

    name: Annotated[Required[str], Field(min_length=1, max_length=63, description="Name that volumeMounts refer to")]
    emptyDir: Annotated[EmptyDir, Field(description="Empty folder that lives as long as the pod")]
    persistentVolumeClaim: Annotated[ClaimRef, Field(description="PersistentVolumeClaim of the run's namespace")]
    configMap: Annotated[ConfigMapVolume, Field(description="Keys of a ConfigMap as files")]
    secret: Annotated[SecretVolume, Field(description="Keys of a Secret as files")]
    projected: Annotated[ProjectedVolume, Field(description="Several sources in one folder")]
    downwardAPI: Annotated[DownwardVolume, Field(description="Fields of the pod as files")]
    csi: Annotated[CsiVolume, Field(description="Volume that a CSI driver makes for the pod")]
    ephemeral: Annotated[EphemeralVolume, Field(description="Volume of a StorageClass that lives as long as the pod")]
    hostPath: Annotated[HostPath, Field(description="File or folder of the node")]
    nfs: Annotated[Nfs, Field(description="Folder of an NFS server")]
    image: Annotated[ImageVolume, Field(description="Contents of an OCI image, read-only")]


VOLUME_KINDS = tuple(name for name in Volume.__annotations__ if name != "name")
