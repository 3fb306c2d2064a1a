"""The stages of a run in their order; operator and trainer both ask here."""

from internvl_api.spec import Merge, Method
from internvl_api.spec.evaluation import Evaluation
from internvl_api.status import StageName

# Stages that run on GPUs, as a group of pods; every other stage is one pod on the CPU.
PARALLEL_STAGES: frozenset[StageName] = frozenset({"baseline-evaluate", "train", "evaluate"})


def stage_names(method: Method, evaluation: Evaluation, merge: Merge) -> tuple[StageName, ...]:
    """Names of a run's stages: preflight, train and publish always, the others where the spec asks for them."""
    wanted: dict[StageName, bool] = {
        "preflight": True,
        "baseline-evaluate": bool(evaluation.tasks) and evaluation.baseline,
        "train": True,
        "evaluate": bool(evaluation.tasks),
        # Full training writes a whole model in upstream's format anyway.
        "merge": bool(merge.formats) if method == "lora" else "hf" in merge.formats,
        "publish": True,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)
