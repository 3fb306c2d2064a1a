"""Which defaults of namespace and cluster a run uses: a stage that runs keeps those that its pods were made with."""

from collections.abc import Sequence

from internvl_api.status import InternVLFineTuneStatus
from internvl_api.validation.defaults import RunDefaults

from internvl_operator.core.observe import Pod
from internvl_operator.core.run import recorded_defaults


def in_force(today: RunDefaults, status: InternVLFineTuneStatus, pods: Sequence[Pod]) -> RunDefaults:
    """The recorded defaults while a pod of the run works; else today's.

    The output stays while any pod may write to it or has, and once a stage has results there.

    Args:
        status: as recorded.
        pods: the run's own.
    """
    recorded = recorded_defaults(status)
    has_results = any(entry.state == "Succeeded" for entry in status.stages)
    output = recorded.output if pods or has_results else ""
    working = any(not (pod.unstarted or pod.finished) for pod in pods)
    return (recorded if working else today)._replace(output=output, run=today.run)
