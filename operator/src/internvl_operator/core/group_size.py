"""The number of workers in a group: spec.workers, or fewer where spec.minWorkers allows it and room is short.

status.elastic remembers the smaller number. `sized` puts it into the run's spec and RunConfig, so that everything that
builds or counts a group sees one number.
"""

from dataclasses import replace

from internvl_api.memory.stop_time import grace_seconds
from internvl_api.spec import InternVLFineTuneSpec

from internvl_operator.core.run import Run


def fitting(spec: InternVLFineTuneSpec, wanted: int, room: int) -> int | None:
    """The largest number of workers up to `room` that can share the global batch; None below spec.minWorkers.

    Numbers between minWorkers and `wanted` that do not divide the global batch are left out.
    """
    if spec.min_workers is None:
        return None
    of_one = spec.processes_per_worker * spec.training.micro_batch_size
    sizes = range(min(room, wanted), spec.min_workers - 1, -1)
    return next((size for size in sizes if spec.training.global_batch_size % (size * of_one) == 0), None)


def sized(run: Run) -> Run:
    """The run, with as many workers as status.elastic says; unchanged when that is not about this spec.

    The gradient accumulation grows as the number of workers falls, so that the global batch stays the same.
    """
    elastic, spec, run_config = run.status.elastic, run.resolved.spec, run.resolved.run_config
    if elastic is None or spec is None or run_config is None or run.status.run_digest != run.run_digest:
        return run
    size = elastic.workers
    if size >= spec.workers or fitting(spec, spec.workers, size) != size:
        return run
    samples = size * spec.processes_per_worker * spec.training.micro_batch_size
    changed = {"workers": size, "gradient_accumulation": spec.training.global_batch_size // samples}
    smaller = run_config.model_copy(update=changed)
    grace = grace_seconds(spec.pod_template.termination_grace_period_seconds, smaller)  # each stores a larger share
    resolved = run.resolved._replace(
        spec=spec.model_copy(update={"workers": size}),
        run_config=smaller.model_copy(update={"grace_seconds": grace}),
        run_yaml="",  # made from the RunConfig when it is needed
    )
    return replace(run, resolved=resolved, wanted_workers=spec.workers)
