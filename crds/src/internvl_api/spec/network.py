"""The section `network` of a spec: how the workers of training reach each other."""

from pydantic import Field

from internvl_api.types import ApiModel

NETWORK_PATTERN = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"


class Network(ApiModel):
    """The network between the workers of training."""

    profile: str | None = Field(
        None,
        pattern=NETWORK_PATTERN,
        max_length=63,
        description="What pods of training get for a fast network: infiniband, roce, efa, gke-tcpxo, host (network "
        "of the node), or a profile of the operator's setting networkProfiles. none, the default: TCP over the pod "
        "network",
    )
    bandwidth_check: bool | None = Field(
        None,
        description="Whether each attempt at training with several processes first measures an all-reduce and the "
        "storage of spec.output, for at most half a minute. Default: true",
    )
