"""`internvl-trainer COMMAND`: finds the command's module, parses its options and runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast, get_args

from internvl_api.status import StageName

from internvl_trainer.cli.options import CommandError
from internvl_trainer.errors import UserError
from internvl_trainer.exit_status import configure_logging, exit_code_of

_DESCRIPTION = """\
The stages of an InternVL fine-tuning run, and tools around them. In a cluster the operator starts each stage in pods of
its own; `run` does all of them on this machine. A stage stores its results under the output of run.yaml and writes
their manifest last: a finished stage is skipped, and training resumes from its newest checkpoint.
"""
_EPILOG = """\
examples:
  internvl-trainer resolve cr.yaml > run.yaml         make the run.yaml of an InternVLFineTune, without a cluster
  internvl-trainer run --config run.yaml              run all stages here, with a progress display
  internvl-trainer preflight --config run.yaml        check model, every row and the output; train nothing
  internvl-trainer report --config run.yaml           write the results so far as a page: report/index.html
  internvl-trainer COMMAND --help                     show a command's options and examples

exit codes:
  0   done
  1   internal error; the log has the traceback
  65  correct the data, the checkpoint or the settings; the message names what
  69  storage or network does not answer; try later
  70  evaluated, and below publishIf
  75  stopped, state saved; start it again
  77  credentials refused
  78  run.yaml cannot be used

credentials come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION and HF_TOKEN; for gs://
from GOOGLE_APPLICATION_CREDENTIALS_JSON or Google's defaults; for az:// from AZURE_STORAGE_CONNECTION_STRING, or
AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or Azure's defaults;
publishing to the Hub prefers HF_WRITE_TOKEN.
"""
_COMMANDS = {
    "run": "run all stages on this machine, with a progress display",
    "preflight": "check the model, every row of the data and the output, without a GPU",
    "baseline-evaluate": "answer the tasks with the base model",
    "baseline-score": "score the base model's captions, without a GPU",
    "train": "train from the newest checkpoint, in one process of the group or all of this pod",
    "evaluate": "answer the tasks with the trained model; without captions, check publishIf",
    "score": "score the trained model's captions, without a GPU, and check publishIf",
    "merge": "write whole models of the base model and what was trained, in the formats asked for",
    "publish": "fill artifacts/ with the result and its record, check it, and send it to the Hub if asked to",
    "report": "write the results so far as a page to open",
    "tensorboard": "show the curves in TensorBoard, also while the run trains",
    "resolve": "print the run.yaml of an InternVLFineTune, with its recipe and defaults filled in",
    "recipes": "list the named defaults, or show one",
    "doctor": "check GPUs, driver, network, disk, storage and limits of this machine before a run",
    "estimate": "estimate the memory that a run needs on each GPU, without a GPU",
    "inspect": "show the tokens, labels and tiles of single rows",
    "data": "convert an annotation, show its figures, or write a page of its rows as the model sees them",
    "chat": "ask a model about pictures",
    "convert": "convert a checkpoint to transformers' format, or back",
}
_OF_STAGE = set(get_args(StageName)) - {"doctor"}  # commands of cli/stage.py; doctor has options of its own


class Command(Protocol):
    """What a command's module has; a module of several commands has a description for each."""

    DESCRIPTION: str | dict[str, str]
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    configure_logging()
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"{error.reason}: {error}", file=sys.stderr)
        return exit_code_of(error)
    except CommandError as error:
        print(error, file=sys.stderr)
        return error.code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; `run` among them is the command's function. Only its module is imported."""
    parser = argparse.ArgumentParser(
        prog="internvl-trainer",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in arguments[:1]:
            module = _load(name)
            about = module.DESCRIPTION
            command.description = about if isinstance(about, str) else about[name]
            command.epilog = module.EXAMPLES
            module.add_arguments(command)
            command.set_defaults(run=module.run, command=name)
    return parser.parse_args(arguments)


def _load(name: str) -> Command:
    return cast(Command, import_module(f"internvl_trainer.cli.{'stage' if name in _OF_STAGE else name}"))
