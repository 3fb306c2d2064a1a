"""`internvl-trainer STAGE`: one stage of a run, in this process or in several of this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from internvl_api.constants import ExitCode
from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

from internvl_trainer.artifacts.flight_recorder import keep_recordings
from internvl_trainer.cli.launcher import launch, own_command
from internvl_trainer.cli.options import add_config, load_config, on_chosen_device
from internvl_trainer.distributed import Rendezvous, flight_folder, prepare_environment
from internvl_trainer.exit_status import Outcome, conclude, report, termination_path
from internvl_trainer.metrics import Reporter
from internvl_trainer.signals import die_with_parent, ignore_stops, stop_by_exception

DESCRIPTION = {
    "preflight": """\
Check the output, the model and every row of the data before a GPU is needed. Writes all findings to
stages/preflight/preflight.json; a bad row ends the stage unless data.badRows is skip.
""",
    "baseline-evaluate": """\
Answer the tasks of evaluation.tasks with the base model, and score all answers but captions. Answers are stored as
they come: after an interruption the stage goes on with the rows that are left.
""",
    "baseline-score": """\
Score the captions of baseline-evaluate. Needs Java, and no GPU.
""",
    "train": """\
Train from the newest intact checkpoint to the last step, and store the weights under stages/train/. SIGTERM and Ctrl-C
abandon the step, store a checkpoint and exit with 75; the same command then resumes, also with another number of GPUs.
""",
    "evaluate": """\
Answer the tasks with the trained model, and score all answers but captions. Without captions, check publishIf: figures
below it end the stage with exit code 70, after a report is written to stages/evaluate/report/.
""",
    "score": """\
Score the captions of evaluate, and check publishIf: figures below it end the stage with exit code 70, after a report is
written to stages/score/report/. Needs Java, and no GPU.
""",
    "merge": """\
Write whole models of the base model and what was trained, in the formats of merge.formats. Each is checked against the
unmerged model by its tensors and its logits before it is stored.
""",
    "publish": """\
Copy weights, metrics, report and model card to artifacts/, check every file, and write its manifest last. With
publish.hub, send the model to the Hugging Face Hub in one commit.
""",
}
EXAMPLES = """\
example:
  internvl-trainer STAGE --config run.yaml

A stage that is done is skipped. Training and evaluation run as one process for each GPU of the pod
(PET_NPROC_PER_NODE). Exit codes: see `internvl-trainer --help`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    """Run the stage that the command is named after."""
    return run_stage_here(options.command, on_chosen_device(load_config(options.config)), options.config)


def run_stage_here(stage: StageName, config: RunConfig, path: Path) -> int:
    """Run one stage in this process, or in child processes when this machine has several; the exit code."""
    rendezvous = Rendezvous.from_environment(os.environ)
    # The kernel keeps SIGABRT from process 1 of a container: abort() there ends as a segmentation fault.
    alone = rendezvous.processes == 1 and os.getpid() != 1
    if stage in PARALLEL_STAGES and not alone and "LOCAL_RANK" not in os.environ:
        flight_folder().mkdir(parents=True, exist_ok=True)
        code = launch(own_command(stage, str(path)), rendezvous, termination_path(), stage=stage)
        if code not in (ExitCode.OK, ExitCode.RESUME):
            keep_recordings(config, stage)
        return code
    if "LOCAL_RANK" in os.environ:
        die_with_parent()
    prepare_environment(config.device, rendezvous.processes)
    outcome = _in_this_process(stage, config, local_rank=rendezvous.local_rank)
    report(outcome)
    return outcome.code


def _in_this_process(stage: StageName, config: RunConfig, *, local_rank: int) -> Outcome:
    from internvl_trainer.stages.pipeline import run_stage  # after prepare_environment, whose settings it may read

    reporter = Reporter(config.job, stage)
    reporter.serve(local_rank)
    if "LOCAL_RANK" in os.environ:
        ignore_stops()
    try:
        with stop_by_exception():
            return conclude(stage, lambda: run_stage(stage, config, reporter))
    finally:
        reporter.close()
