"""Whether training can use the network devices that its profile asks for."""

from collections.abc import Mapping

from internvl_api.spec import InternVLFineTuneSpec

from internvl_operator.core.network_profiles import NetworkProfile, find_profile


def unused_devices(spec: InternVLFineTuneSpec, workers: int, own: Mapping[str, NetworkProfile]) -> str | None:
    """What a profile takes of each node although training cannot use it, as a warning; None where it can.

    A profile that asks for no device costs nothing, such as the network of the node.

    Args:
        workers: as the run wants them; while room is short, it may have fewer.
        own: the administrator's profiles.
    """
    name = spec.network.profile or "none"
    parts = _parts(find_profile(name, own))
    if not parts or not spec.trains:
        return None
    if spec.gpus_per_worker == 0:
        why = "spec.gpusPerWorker is 0, and ranks on the CPU exchange over TCP"
    elif workers == 1:
        why = "spec.workers is 1, and GPUs of one worker exchange inside their node"
    else:
        return None
    return (
        f"spec.network.profile: found {name}, which takes {', '.join(parts)} for each worker; training cannot use "
        f"them, because {why}; set it to none"
    )


def _parts(profile: NetworkProfile) -> list[str]:
    """The devices and daemons of a profile, for messages."""
    devices = [f"{name}: {count}" for name, count in profile.resources.items()]
    claims = [f"the resource claim {claim['name']}" for claim in profile.resource_claims]
    return devices + claims + [f"the sidecar {sidecar['name']}" for sidecar in profile.sidecars]
