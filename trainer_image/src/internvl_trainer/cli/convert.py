"""`internvl-trainer convert`: a checkpoint from upstream's format to transformers' own, and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_api.constants import ExitCode
from internvl_api.quantity import gib, parse_bytes

from internvl_trainer.cli.options import CommandError

DESCRIPTION = """\
Convert a checkpoint directory from upstream's format to that of plain transformers, or back.
"""
EXAMPLES = """\
examples:
  internvl-trainer convert InternVL2-2B InternVL2-2B-hf --to hf     loads with AutoModelForImageTextToText
  internvl-trainer convert InternVL2-2B-hf back --to upstream       the same files as before
  internvl-trainer convert tuned-hf tuned --to upstream --base InternVL2-2B

Values never change: a checkpoint converted there and back is equal to the last bit. Only one tensor is in memory at a
time, whatever the model's size. Code in a checkpoint is copied and never run.

exit codes: 0 done   65 a directory cannot be used   69 the target cannot be written
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint directory, in either format")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to write: empty, or not there yet")
    parser.add_argument("--to", required=True, choices=("upstream", "hf"), help="the format of DST")
    parser.add_argument(
        "--shard-size", type=_size, metavar="SIZE", help="of a weight file: 5GB (the default), 2Gi, …; back: as it was"
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="with --to upstream, where SRC does not keep upstream's files: a directory that has them",
    )


def run(options: argparse.Namespace) -> int:
    """Convert, and print what was written."""
    from internvl_trainer.model.convert_checkpoint import convert_checkpoint

    try:
        done = convert_checkpoint(
            options.source, options.target, options.to, shard_size=options.shard_size, base=options.base
        )
    except OSError as error:
        raise CommandError(f"{options.target} cannot be written: {error}", ExitCode.UNAVAILABLE) from error
    print(f"{options.target}: {done.tensors} tensors, {gib(done.nbytes)}, in {len(done.files)} files")
    return ExitCode.OK


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).replace("memory", "data")) from None
