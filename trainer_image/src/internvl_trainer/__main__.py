"""The command line: `internvl-trainer --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from internvl_api.constants import CONFIG_PATH, ENV_DEVICE, ExitCode
from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName
from pydantic import ValidationError

from internvl_trainer.cli import chat, convert
from internvl_trainer.cli.config_file import explain
from internvl_trainer.cli.estimate import add_estimate_command, add_recipes_command, count
from internvl_trainer.cli.resolve import add_resolve_command
from internvl_trainer.cli.tensorboard import add_tensorboard_command
from internvl_trainer.errors import UserError
from internvl_trainer.exit_status import Outcome, conclude, configure_logging, exit_code_of, report, termination_path

_DESCRIPTION = """\
The stages of an InternVL fine-tuning run. In a cluster the operator starts each as pods of its own; `run` does all of
them on this machine. What a stage makes goes to the output of run.yaml, with a manifest written last: a stage that is
done is skipped, and training goes on from its newest checkpoint.
"""
_EXAMPLES = """\
examples:
  internvl-trainer run --config run.yaml              all stages here, with a progress display
  internvl-trainer run --config run.yaml --nproc 2    the same with two training processes
  internvl-trainer preflight --config run.yaml        check model, every row and the output; trains nothing
  internvl-trainer inspect --help                     see the tokens, labels and tiles of single rows
  internvl-trainer convert SRC DST --to hf            a checkpoint that plain transformers loads
  internvl-trainer chat --model DIR --image FILE      ask a model about a picture
  internvl-trainer resolve cr.yaml > run.yaml         the run.yaml of an InternVLFineTune, without a cluster
  internvl-trainer report --config run.yaml           what came of it, as a page: report/index.html
  internvl-trainer recipes                            the published scripts' settings, by name
  internvl-trainer estimate --recipe NAME --gpus 8    memory that a run needs on each GPU
  internvl-trainer tensorboard --config run.yaml      the run's curves, while it trains too

exit codes:
  0 done   75 stopped, state saved, start me again   65 data, checkpoint or settings to correct
  78 run.yaml cannot be used   77 credentials refused   69 storage or network away, try later
  70 evaluated, and below publishIf   1 a fault of ours

credentials come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION and HF_TOKEN.
"""
_RUN_DESCRIPTION = """\
Every stage of a run on this machine: preflight, the evaluations, training, merging and publishing, as run.yaml asks for
them. Stopped (Ctrl-C) or broken off, the same command goes on where it was; a stage that is done is skipped.
"""
_RUN_EXAMPLES = """\
examples:
  internvl-trainer resolve cr.yaml > run.yaml         from an InternVLFineTune
  internvl-trainer run --config run.yaml
  internvl-trainer run --config run.yaml --nproc 4    four GPUs instead of the file's, with the same global batch

exit codes: as of `internvl-trainer --help`; 70 says that the figures do not meet publishIf
"""
_REPORT_DESCRIPTION = """\
Write what a run has to show so far into a folder: index.html (open it in a browser), its pictures, and README.md, the
model card. It reads the run's output and changes nothing there; while training goes on, it shows the newest checkpoint.
"""
_STAGES = {
    "preflight": "check the model, every row of the data and the output, before any GPU is asked for",
    "baseline-evaluate": "answer the tasks with the base model, and score the answers",
    "train": "train (one process of the group, or all of this pod's) from the newest checkpoint",
    "evaluate": "answer the tasks with the trained model, score the answers, and weigh them against publishIf",
    "merge": "make whole models, in the formats asked for, of the base model and what was trained",
    "publish": "bring the result and its record to artifacts/, check them, and send them to the Hub if asked to",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(arguments[:1]).parse_args(arguments)
    configure_logging()
    return int(options.func(options))


def _inspect(options: argparse.Namespace) -> int:
    from internvl_trainer.cli.inspect import run

    try:
        return run(options)
    except UserError as error:
        print(f"{error.reason}: {error}", file=sys.stderr)
        return exit_code_of(error)


def _chat(options: argparse.Namespace) -> int:
    try:
        return chat.run(options)
    except UserError as error:
        print(f"{error.reason}: {error}", file=sys.stderr)
        return exit_code_of(error)


def _run(options: argparse.Namespace) -> int:
    from internvl_trainer.cli.run import run

    config = _load_config(options.config)
    return ExitCode.CONFIG if config is None else run(config, processes=options.nproc)


def _report(options: argparse.Namespace) -> int:
    from internvl_trainer.distributed import prepare_environment

    config = _load_config(options.config)
    if config is None:
        return ExitCode.CONFIG
    prepare_environment(config.device, 1)
    from internvl_trainer.cli.report import write_here

    return write_here(config, options.out)


def _stage(options: argparse.Namespace) -> int:
    config = _load_config(options.config)
    return ExitCode.CONFIG if config is None else run_stage_here(options.stage, config, options.config)


def _load_config(path: Path) -> RunConfig | None:
    """None after saying on stderr what is wrong."""
    try:
        config = RunConfig.load(path)
    except (OSError, yaml.YAMLError, ValidationError) as error:
        print(f"{path} cannot be used: {explain(error)}", file=sys.stderr)
        return None
    return _on_chosen_device(config)


def _on_chosen_device(config: RunConfig) -> RunConfig | None:
    """$INTERNVL_DEVICE=cpu rehearses a run that asks for GPUs, on machines that have none."""
    chosen = os.environ.get(ENV_DEVICE, config.device)
    if chosen not in ("cpu", config.device):
        print(f"{ENV_DEVICE}: found {chosen!r}, expected cpu, or nothing for the run's own device", file=sys.stderr)
        return None
    if chosen != config.device:
        print(f"{ENV_DEVICE}=cpu: training runs on the processor; the GPUs of this pod stay idle", file=sys.stderr)
    return config.model_copy(update={"device": chosen})


def run_stage_here(stage: StageName, config: RunConfig, path: Path) -> int:
    """One stage in this process, or, for several training processes a pod, in children of it."""
    from internvl_trainer.cli.launcher import launch, own_command
    from internvl_trainer.distributed import Rendezvous, prepare_environment
    from internvl_trainer.signals import die_with_parent

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
    from internvl_trainer.metrics import Reporter
    from internvl_trainer.stages.pipeline import run_stage

    reporter = Reporter(config.job, stage)
    reporter.serve(local_rank)
    try:
        return conclude(stage, lambda: run_stage(stage, config, reporter))
    finally:
        reporter.close()


def _parser(command: Sequence[str]) -> argparse.ArgumentParser:
    """All commands; the options of `inspect` only when it is the one given, as they take a second to import."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="internvl-trainer", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="all stages on this machine, with a progress display",
        description=_RUN_DESCRIPTION,
        epilog=_RUN_EXAMPLES,
        formatter_class=raw,
    )
    _add_config(run)
    run.add_argument(
        "--nproc",
        type=count,
        metavar="N",
        help="training processes (default: one, or one a GPU); keeps the global batch",
    )
    run.set_defaults(func=_run)
    for stage, text in _STAGES.items():
        stage_parser = commands.add_parser(stage, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _add_config(stage_parser)
        stage_parser.set_defaults(func=_stage, stage=stage)
    inspect = commands.add_parser("inspect", help="see the tokens, labels and tiles of single rows")
    if command == ["inspect"]:
        from internvl_trainer.cli.inspect import add_arguments

        add_arguments(inspect)
        inspect.set_defaults(func=_inspect)
    convert_parser = commands.add_parser(
        "convert", help="a checkpoint to transformers' format, or back", epilog=convert.EXAMPLES, formatter_class=raw
    )
    convert.add_arguments(convert_parser)
    convert_parser.set_defaults(func=convert.run)
    report_parser = commands.add_parser(
        "report",
        help="what a run has to show so far, as a page to open",
        description=_REPORT_DESCRIPTION,
        formatter_class=raw,
    )
    _add_config(report_parser)
    report_parser.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="where to write it (default: report)"
    )
    report_parser.set_defaults(func=_report)
    chat_parser = commands.add_parser(
        "chat", help="try a model by hand: ask it about pictures", epilog=chat.EXAMPLES, formatter_class=raw
    )
    chat.add_arguments(chat_parser)
    chat_parser.set_defaults(func=_chat)
    add_recipes_command(commands)
    add_estimate_command(commands)
    add_resolve_command(commands)
    add_tensorboard_command(commands)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, default=Path(CONFIG_PATH), metavar="RUN.YAML", help=f"default: {CONFIG_PATH}"
    )


if __name__ == "__main__":
    sys.exit(main())
