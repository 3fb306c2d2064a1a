"""What a cluster cannot do with a spec that is right in itself: the operator and its webhook refuse it alike."""

from pathlib import PurePosixPath

from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import InternVLFineTuneStatus
from internvl_api.validation.violations import SpecError

OUTPUT_STAYS = "cannot change while it holds this run's checkpoints; create another resource to start over there"


def check_in_cluster(spec: InternVLFineTuneSpec, status: InternVLFineTuneStatus) -> None:
    """Raises SpecError. `status`: the last answer to this resource, whatever its spec was then."""
    _check_output_is_kept(spec)
    _check_output_stays(spec, status)


def _check_output_is_kept(spec: InternVLFineTuneSpec) -> None:
    """Stages are pods of their own: what one leaves in a path that is no volume, the next does not find."""
    if not spec.output.startswith("/"):
        return
    mounts = [mount.get("mountPath") for mount in spec.pod_template.volume_mounts]
    if not any(isinstance(path, str) and PurePosixPath(spec.output).is_relative_to(path) for path in mounts):
        text = f"found {spec.output!r}, where podTemplate.volumeMounts mounts nothing: it would go with its pod"
        raise SpecError("InvalidSpec", "spec.output", f"{text}; use s3://bucket/prefix, or mount a volume there")


def _check_output_stays(spec: InternVLFineTuneSpec, status: InternVLFineTuneStatus) -> None:
    """Else the checkpoints would be left behind, and the run would start over without a word."""
    uri = status.checkpoint.uri if status.checkpoint else ""
    kept, found, _ = uri.rpartition("/checkpoints/")
    output = str(PurePosixPath(spec.output)) if spec.output.startswith("/") else spec.output
    if found and kept != output:
        text = f"{OUTPUT_STAYS} (found {spec.output!r}, expected {kept!r})"
        raise SpecError("InvalidSpec", "spec.output", text)
