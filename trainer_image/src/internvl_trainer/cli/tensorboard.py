"""`internvl-trainer tensorboard`: the curves of a run in TensorBoard, while it trains or afterwards."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from internvl_api.constants import ExitCode
from internvl_api.run_config import RunConfig
from pydantic import ValidationError

from internvl_trainer.artifacts.fingerprint import RUN_FILE, stage_folder
from internvl_trainer.artifacts.manifest import MANIFEST
from internvl_trainer.artifacts.storage import Storage, StoredFile, open_storage
from internvl_trainer.cli.config_file import explain
from internvl_trainer.errors import UserError
from internvl_trainer.exit_status import exit_code_of
from internvl_trainer.signals import die_with_parent
from internvl_trainer.train.metrics_log import EVENTS_FOLDER

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_REFRESH_SECONDS = 5.0
_REQUIREMENT = "tensorboard>=2.19"
_ARTIFACTS = "artifacts"
_DESCRIPTION = """\
Bring the TensorBoard events of a run here, show them in TensorBoard, and look for new ones every few seconds until
Ctrl-C. A run that trains stores its events with every checkpoint (checkpoint.everySteps); a finished one has them among
its artifacts.
"""
_EXAMPLES = """\
examples:
  internvl-trainer tensorboard --config run.yaml                        then open http://localhost:6006
  internvl-trainer tensorboard --config run.yaml --port 7007
  internvl-trainer tensorboard --logdir s3://models/team/coco-lora      a run's output
  internvl-trainer tensorboard --logdir runs/coco-lora/artifacts/tensorboard

in a cluster, on your own machine, with AWS_* as for the run:
  internvl-trainer tensorboard --logdir "$(kubectl get ivft NAME -o jsonpath='{.spec.output}')"

exit codes: 0 closed   65 nothing to show, or TensorBoard is absent   77 credentials refused   69 storage away
"""


def add_tensorboard_command(subparsers: Subparsers) -> None:
    """`tensorboard`; sets `func`, which takes the parsed options and gives the exit code."""
    parser = subparsers.add_parser(
        "tensorboard",
        help="show a run's curves in TensorBoard, while it trains too",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="RUN.YAML", help="of the run; its output has the events")
    what.add_argument("--logdir", metavar="URI", help="a run's output or a folder of events: s3://, pvc:// or a path")
    parser.add_argument("--port", type=int, default=6006, metavar="N", help="of localhost; default: 6006")
    parser.set_defaults(func=run_tensorboard)


def run_tensorboard(options: argparse.Namespace) -> int:
    """Show the events until TensorBoard ends; where that cannot be, one line on stderr says why."""
    try:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "TensorBoardMissing",
                f"TensorBoard is not installed in {sys.prefix}; run `{sys.executable} -m pip install "
                f"'{_REQUIREMENT}'`, or use the trainer's image, which has it",
            )
        if options.logdir and "://" not in options.logdir and not _is_output(Path(options.logdir)):
            return show_folder(Path(options.logdir), options.port)
        output, waits = (options.logdir, False) if options.logdir else (RunConfig.load(options.config).output, True)
        with tempfile.TemporaryDirectory(prefix="tensorboard-") as folder:
            mirror = Mirror(open_storage(output, field="--logdir" if options.logdir else "output"), Path(folder))
            return show_mirror(mirror, options.port, waits=waits)
    except (OSError, yaml.YAMLError, ValidationError) as error:
        print(f"{options.config or options.logdir} cannot be used: {explain(error)}", file=sys.stderr)
        return ExitCode.CONFIG
    except UserError as error:
        print(f"{error.reason}: {error}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return ExitCode.OK


class Mirror:
    """A local copy of a run's newest events. Files only grow, as TensorBoard reads on where it stopped."""

    def __init__(self, storage: Storage, target: Path) -> None:
        self.storage, self.target = storage, target
        self._seen: dict[str, tuple[str, str]] = {}  # local name to key and etag

    def refresh(self) -> int:
        """Bring what is new; how many files changed. Raises UserError when storage refuses or is away."""
        folder = newest_events(self.storage)
        changed = 0
        for stored in list(self.storage.list(f"{folder}/" if folder else "")):
            name = stored.key.removeprefix(f"{folder}/")
            if "tfevents" in name and self._seen.get(name) != (stored.key, stored.etag):
                changed += self._bring(name, stored)
        return changed

    def _bring(self, name: str, stored: StoredFile) -> bool:
        arriving = self.target / ".arriving"
        try:
            self.storage.download(stored.key, arriving)
        except UserError as error:
            if error.reason == "NotFound":  # its checkpoint was deleted for a newer one meanwhile
                return False
            raise
        put(arriving, self.target / name)
        self._seen[name] = (stored.key, stored.etag)
        return True


def newest_events(storage: Storage) -> str:
    """The folder with the events of a run's output: published, of the finished training, or of the newest checkpoint.

    Empty for storage that is no run's output: a folder of events itself.
    """
    from internvl_trainer.train.checkpoint import JOURNAL, stored_folders  # imports PyTorch

    for folder in (_ARTIFACTS, stage_folder("train")):
        if storage.stat(f"{folder}/{MANIFEST}"):
            return f"{folder}/{EVENTS_FOLDER}"
    if checkpoints := stored_folders(storage):
        return f"{checkpoints[0]}/{JOURNAL}/{EVENTS_FOLDER}"
    return f"{stage_folder('train')}/{EVENTS_FOLDER}" if storage.stat(RUN_FILE) else ""


def put(arrived: Path, path: Path) -> None:
    """Move a newer state of an event file into its place: append where that is all that is new."""
    old, new = path.read_bytes() if path.exists() else b"", arrived.read_bytes()
    if old and new.startswith(old):
        with path.open("ab") as file:
            file.write(new[len(old) :])
        arrived.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(arrived, path)


def show_mirror(mirror: Mirror, port: int, *, waits: bool) -> int:
    """TensorBoard over the mirror, refreshed until it ends; `waits` for events that are not there yet."""
    place = mirror.storage.uri
    if not mirror.refresh():
        if not waits:
            raise UserError("NotFound", f"found no TensorBoard events under {place}; check the URI", "--logdir")
        print(f"no events under {place} yet; they come with the first checkpoint", file=sys.stderr)

    def refresh() -> None:
        try:
            mirror.refresh()
        except UserError as error:
            print(f"{error.reason}: {error}; trying again", file=sys.stderr)

    return _show(mirror.target, port, refresh)


def show_folder(folder: Path, port: int) -> int:
    """TensorBoard over a local folder of events, where they are."""
    if not any(folder.rglob("*tfevents*")):
        raise UserError("NotFound", f"found no TensorBoard events under {folder}; check the path", "--logdir")
    return _show(folder, port, lambda: None)


def _show(folder: Path, port: int, refresh: Callable[[], None]) -> int:
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    with subprocess.Popen(command, preexec_fn=die_with_parent) as process:
        try:
            while True:
                try:
                    return process.wait(_REFRESH_SECONDS)
                except subprocess.TimeoutExpired:
                    refresh()
        finally:
            process.terminate()


def _is_output(path: Path) -> bool:
    return (path / RUN_FILE).is_file()
