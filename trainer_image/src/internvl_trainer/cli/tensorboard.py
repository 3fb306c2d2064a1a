"""`internvl-trainer tensorboard`: the curves of a run in TensorBoard, while it trains or afterwards."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from internvl_api.constants import ExitCode

from internvl_trainer.artifacts.manifest import MANIFEST
from internvl_trainer.artifacts.output_layout import ARTIFACTS, EVENTS_FOLDER, JOURNAL, RUN_FILE, stored_checkpoints
from internvl_trainer.artifacts.storage import Storage, StoredFile, open_storage
from internvl_trainer.cli.options import load_config
from internvl_trainer.errors import UserError
from internvl_trainer.signals import die_with_parent
from internvl_trainer.stage_store import stage_key

_REFRESH_SECONDS = 5.0
_REQUIREMENT = "tensorboard>=2.19"
DESCRIPTION = """\
Download the TensorBoard events of a run, show them in TensorBoard, and look for new ones every few seconds until
Ctrl-C. A run in training stores its events with every checkpoint (checkpoint.everySteps); a finished run has them among
its artifacts.
"""
EXAMPLES = """\
examples:
  internvl-trainer tensorboard --config run.yaml                        then open http://localhost:6006
  internvl-trainer tensorboard --config run.yaml --port 7007
  internvl-trainer tensorboard --config run.yaml --host 0.0.0.0         from other machines too; nobody has to log in
  internvl-trainer tensorboard --logdir s3://models/team/coco-lora      a run's output
  internvl-trainer tensorboard --logdir runs/coco-lora/artifacts/tensorboard

in a cluster, on your own machine, with AWS_* as for the run:
  internvl-trainer tensorboard --logdir "$(kubectl get ivft NAME -o jsonpath='{.spec.output}')"

exit codes: 0 closed   65 nothing to show, or TensorBoard is absent   77 credentials refused   69 storage away
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="RUN.YAML", help="the run's; its output has the events")
    what.add_argument(
        "--logdir", metavar="URI", help="a run's output or a folder of events: s3://, gs://, az://, pvc:// or a path"
    )
    parser.add_argument("--port", type=int, default=6006, metavar="N", help="port to listen on (default: 6006)")
    parser.add_argument(
        "--host", default="localhost", metavar="ADDRESS", help="address to listen on (default: localhost)"
    )


def run(options: argparse.Namespace) -> int:
    """Show the events until TensorBoard ends. Raises UserError where there is nothing to show."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "TensorBoardMissing",
            f"TensorBoard is not installed in {sys.prefix}; run `{sys.executable} -m pip install "
            f"'{_REQUIREMENT}'`, or use the trainer's image, which has it",
        )
    with suppress(KeyboardInterrupt):
        if options.logdir and "://" not in options.logdir and not _is_output(Path(options.logdir)):
            return show_folder(Path(options.logdir), options.host, options.port)
        output, waits = (options.logdir, False) if options.logdir else (load_config(options.config).output, True)
        with tempfile.TemporaryDirectory(prefix="tensorboard-") as folder:
            mirror = Mirror(open_storage(output, field="--logdir" if options.logdir else "output"), Path(folder))
            return show_mirror(mirror, options.host, options.port, waits=waits)
    return ExitCode.OK


class Mirror:
    """A local copy of a run's newest events. Files only grow, because TensorBoard reads on where it stopped."""

    def __init__(self, storage: Storage, target: Path) -> None:
        self.storage, self.target = storage, target
        self._seen: dict[str, tuple[str, str]] = {}  # local name to key and etag

    def refresh(self) -> int:
        """Download new events; the number of files that changed. Raises UserError when storage refuses or is away."""
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
    trained = stage_key("train")
    for folder in (ARTIFACTS, trained):
        if storage.stat(f"{folder}/{MANIFEST}"):
            return f"{folder}/{EVENTS_FOLDER}"
    if checkpoints := stored_checkpoints(storage):
        return f"{checkpoints[0]}/{JOURNAL}/{EVENTS_FOLDER}"
    return f"{trained}/{EVENTS_FOLDER}" if storage.stat(RUN_FILE) else ""


def put(arrived: Path, path: Path) -> None:
    """Replace an event file with its newer version, by appending where the old one is its start."""
    old, new = path.read_bytes() if path.exists() else b"", arrived.read_bytes()
    if old and new.startswith(old):
        with path.open("ab") as file:
            file.write(new[len(old) :])
        arrived.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(arrived, path)


def show_mirror(mirror: Mirror, host: str, port: int, *, waits: bool) -> int:
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

    return _show(mirror.target, host, port, refresh)


def show_folder(folder: Path, host: str, port: int) -> int:
    """TensorBoard over a local folder of events, where they are."""
    if not any(folder.rglob("*tfevents*")):
        raise UserError("NotFound", f"found no TensorBoard events under {folder}; check the path", "--logdir")
    return _show(folder, host, port, lambda: None)


def _show(folder: Path, host: str, port: int, refresh: Callable[[], None]) -> int:
    place = ["--host", host, "--port", str(port)]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), *place]
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
