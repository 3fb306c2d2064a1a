"""`internvl-trainer STAGE`: one stage of a run, in this process or in several of this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

from internvl_trainer.cli.launcher import launch, own_command
from internvl_trainer.cli.options import add_config, load_config, on_chosen_device
from internvl_trainer.distributed import Rendezvous, prepare_environment
from internvl_trainer.exit_status import Outcome, conclude, report, termination_path
from internvl_trainer.metrics import Reporter
from internvl_trainer.signals import die_with_parent

DESCRIPTION = ""  # each stage's line of `internvl-trainer --help`
EXAMPLES = """\
With several processes on this machine (PET_NPROC_PER_NODE), training and evaluation start one for each GPU. A stage
that is done is skipped. Exit codes: see `internvl-trainer --help`.
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
        return launch(own_command(stage, str(path)), rendezvous, termination_path())
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
    try:
        return conclude(stage, lambda: run_stage(stage, config, reporter))
    finally:
        reporter.close()
