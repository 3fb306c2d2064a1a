"""Which stages a run has, in their order: the one place that both sides ask."""

from internvl_api.spec import Merge, Method
from internvl_api.spec.evaluation import Evaluation
from internvl_api.status import StageName

# These take the GPUs, as a group of pods; all others are one pod on the CPU.
PARALLEL_STAGES: frozenset[StageName] = frozenset({"baseline-evaluate", "train", "evaluate"})


def stage_names(method: Method, evaluation: Evaluation, merge: Merge) -> tuple[StageName, ...]:
    """preflight, train and publish always; the rest where the spec asks for it."""
    wanted: dict[StageName, bool] = {
        "preflight": True,
        "baseline-evaluate": bool(evaluation.tasks) and evaluation.baseline,
        "train": True,
        "evaluate": bool(evaluation.tasks),
        # Full training writes a whole model in upstream's format by itself.
        "merge": bool(merge.formats) if method == "lora" else "hf" in merge.formats,
        "publish": True,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)
