"""What several commands share: run.yaml as an option, numbers as options, and how a command reports a mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import yaml
from internvl_api.constants import CONFIG_PATH, ENV_DEVICE, ExitCode
from internvl_api.run_config import RunConfig
from internvl_api.spec import Image
from pydantic import ValidationError

from internvl_trainer.cli.local_paths import with_absolute_paths
from internvl_trainer.data.tiling import MOST_TILES
from internvl_trainer.errors import UserError


class CommandError(Exception):
    """Ends a command: the message goes to stderr, `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add --config."""
    parser.add_argument(
        "--config", type=Path, default=Path(CONFIG_PATH), metavar="RUN.YAML", help=f"the run (default: {CONFIG_PATH})"
    )


def load_config(path: Path) -> RunConfig:
    """The run's configuration; its relative paths start at the file's folder.

    Raises CommandError naming the file and every field that is wrong.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        return RunConfig.model_validate(with_absolute_paths(document, path.parent))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes that are no text, too
        raise CommandError(f"{path} cannot be used: {_explain(error)}", ExitCode.CONFIG) from error


def on_chosen_device(config: RunConfig) -> RunConfig:
    """The run on the device of $INTERNVL_DEVICE: `cpu` rehearses a GPU run on a machine without GPUs."""
    chosen = os.environ.get(ENV_DEVICE, config.device)
    if chosen not in ("cpu", config.device):
        raise CommandError(
            f"{ENV_DEVICE}: found {chosen!r}, expected cpu, or unset it to use the run's own device", ExitCode.CONFIG
        )
    if chosen != config.device:
        print(f"{ENV_DEVICE}=cpu: training runs on the processor; the GPUs of this pod stay idle", file=sys.stderr)
    return config.model_copy(update={"device": chosen})


def count(text: str) -> int:
    """The type of an option that counts things: 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected 1 or more")
    return value


def tiles(text: str) -> int:
    """The type of an option that counts the tiles of a picture."""
    value = count(text)
    if value > MOST_TILES:
        raise argparse.ArgumentTypeError(f"found {text}, expected at most {MOST_TILES}")
    return value


def check_target(target: Path, sources: Iterable[Path]) -> None:
    """Raises UserError when a file to write is one of the files that are read, which would be lost."""
    if target.exists() and any(source.exists() and target.samefile(source) for source in sources):
        raise UserError(
            "OutputNotWritable", "this is a file of the annotation; name another file to write", str(target)
        )


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --exif and --background, with the values and defaults of the spec's `image`."""
    for name, text in (
        ("exif", "EXIF orientation of pictures: ignore it or turn them upright"),
        ("background", "colour under transparent pixels; none drops the transparency"),
    ):
        field = Image.model_fields[name]
        parser.add_argument(
            f"--{name}",
            choices=get_args(field.annotation),
            default=field.default,
            help=f"{text} (default: {field.default})",
        )


def _explain(error: Exception) -> str:
    """One line for each wrong field of a run.yaml; the text of any other error."""
    if not isinstance(error, ValidationError):
        return str(error)
    wrong = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
    if "apiVersion" in dict(wrong):
        return "it is a manifest for Kubernetes; `internvl-trainer resolve CR.yaml > run.yaml` makes a run.yaml of it"
    return "".join(f"\n  {field}: {message}" if field else message for field, message in wrong)
