"""What refuses a spec in a cluster only: the operator and its webhook check it, a single machine does not."""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from internvl_api.memory.answering import answering_of, gpus_of_a_copy, not_possible
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.tracking import TRACKER_KEYS
from internvl_api.status import InternVLFineTuneStatus
from internvl_api.validation import policy_rules
from internvl_api.validation.cel_rules import Values, rule
from internvl_api.validation.defaults import RunDefaults
from internvl_api.validation.policy import Policy
from internvl_api.validation.violations import Violation
from internvl_api.validation.volumes import lost_with_pod


class InCluster(NamedTuple):
    """What the cluster knows of the run, and its administrator's policy.

    `checkpoint_uri` is "" before the first checkpoint; `gpu_memory` is in bytes, None where it is not known;
    `profile_gpus` has the network profiles that work with one number of GPUs of a worker alone, with this number.
    """

    checkpoint_uri: str = ""
    policy: Policy = Policy()
    gpu_memory: int | None = None
    defaults: RunDefaults = RunDefaults()
    profile_gpus: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(
        cls,
        status: InternVLFineTuneStatus,
        policy: Policy | None = None,
        gpu_memory: int | None = None,
        defaults: RunDefaults | None = None,
        profile_gpus: tuple[tuple[str, int], ...] = (),
    ) -> "InCluster":
        """From the recorded status, whatever the spec was then; `policy`, `defaults`: None for the default."""
        checkpoint_uri = status.checkpoint.uri if status.checkpoint else ""
        return cls(checkpoint_uri, policy or Policy(), gpu_memory, defaults or RunDefaults(), profile_gpus)


class OutputChange(NamedTuple):
    """The output of a spec, and the output that holds the run's checkpoints ("" without any)."""

    output: str
    kept: str


# The old output: as written, else as the defaults gave it. Written out, because the server bounds the cost of what it
# compares by the lengths of fields, which `orValue` hides.
_GIVEN = "has(oldSelf.status) && has(oldSelf.status.defaults) && has(oldSelf.status.defaults.output)"
_SAME = (
    "has(self.spec.output) ? (has(oldSelf.spec.output) ? self.spec.output == oldSelf.spec.output : "
    f"!({_GIVEN}) || self.spec.output == oldSelf.status.defaults.output) : !has(oldSelf.spec.output)"
)


# At the root, because only there a rule sees the status too.
@rule(
    "",
    f"({_SAME}) || !oldSelf.?status.?checkpoint.hasValue()",
    "cannot change while it holds this run's checkpoints; create another resource to start over there "
    "(found '{found}', expected '{expected}')",
    field="spec.output",
    found="has(self.spec.output) ? self.spec.output : ''",
    expected="has(oldSelf.spec.output) ? oldSelf.spec.output : oldSelf.status.defaults.output",
)
def output_stays(change: OutputChange) -> Values | None:
    """The output is the one with the checkpoints; else the run would start over without a warning."""
    moved = change.kept not in ("", change.output)
    return {"found": change.output, "expected": change.kept} if moved else None


ROOT_RULES = (output_stays,)


def in_cluster(spec: InternVLFineTuneSpec, cluster: InCluster) -> Iterator[Violation]:
    """Violations of a spec that is valid by itself."""
    yield from policy_rules.violations(spec, cluster.policy)
    for field, address in spec.destinations():
        yield from lost_with_pod(spec, field, address)
    yield from _tracker_has_key(spec)
    yield from _profile_has_its_gpus(spec, dict(cluster.profile_gpus))
    if cluster.gpu_memory is not None:
        yield from _evaluation_fits(spec, cluster.gpu_memory)
    kept, _, _ = cluster.checkpoint_uri.rpartition("/checkpoints/")
    output = str(PurePosixPath(spec.output)) if spec.output.startswith("/") else spec.output
    values = output_stays.check(OutputChange(output, kept))
    if values is not None:
        yield Violation("spec.output", output_stays.message.format(**values), output_stays.reason)


def _evaluation_fits(spec: InternVLFineTuneSpec, gpu_memory: int) -> Iterator[Violation]:
    """The GPUs of a worker together hold the model that answers; else hours of training would end in a failure."""
    model = answering_of(spec) if spec.evaluation.tasks and spec.gpus_per_worker else None
    if model is not None and gpus_of_a_copy(model, spec.processes_per_worker, gpu_memory) is None:
        message = not_possible(model, spec.processes_per_worker, gpu_memory)
        yield Violation("spec.evaluation.tasks", message, "EvaluationNotPossible")


def _profile_has_its_gpus(spec: InternVLFineTuneSpec, gpus: Mapping[str, int]) -> Iterator[Violation]:
    """A violation for a profile that cannot work with the GPUs of a worker; training would fail, or be slow."""
    profile = spec.network.profile or ""
    needed = gpus.get(profile)
    if spec.trains and needed is not None and spec.gpus_per_worker != needed:
        text = (
            f"found {spec.gpus_per_worker}, expected {needed}: network.profile {profile} works with no other number; "
            f"set it to {needed}, or choose another profile"
        )
        yield Violation("spec.gpusPerWorker", text, "NetworkProfileNotPossible")


def _tracker_has_key(spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    """A violation for a tracker whose server would refuse every report."""
    tracking = spec.tracking
    key = TRACKER_KEYS[tracking.service] if tracking and not tracking.offline else None
    given = spec.secrets.tracking is not None or any(item["name"] == key for item in spec.pod_template.env)
    if tracking and key and not given:
        text = f"required because tracking.service is {tracking.service}; name a Secret with the key {key}"
        yield Violation("spec.secrets.tracking", text, "SecretMissing")
