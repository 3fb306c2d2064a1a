"""Commands for the result of a run: ask it, load or merge it, and fetch the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from shlex import join

from internvl_api.constants import LOCAL_UID

from internvl_trainer.artifacts.output_layout import ARTIFACTS, RUN_CONFIG
from internvl_trainer.artifacts.storage import local_path
from internvl_trainer.errors import UserError
from internvl_trainer.report.contents import Contents
from internvl_trainer.report.copy_commands import copy_file, copy_folder
from internvl_trainer.report.record import Record
from internvl_trainer.stage_store import stage_key

_LONGEST = 1000  # characters of a command; a longer one is left out, since half a command does not work
_HUB = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?")
_LOAD = 'from transformers import AutoModelForImageTextToText as M; print(M.from_pretrained({}, dtype="auto"))'


@dataclass(frozen=True)
class Use:
    """One command, as a shell takes it, and what it does."""

    what: str
    command: str


def commands(record: Record, there: Contents) -> list[Use]:
    """The commands of the page; those that need a trained model only where there is one.

    Args:
        there: the formats that the run publishes.
    """
    found = [*_with_model(record, there), _report(record)]
    return [use for use in found if len(use.command) <= _LONGEST]


def _with_model(record: Record, there: Contents) -> Iterator[Use]:
    config = record.config
    if record.trained is None:
        return
    is_kept_only = record.verdict is not None and record.verdict.met is False
    root = f"{config.output.rstrip('/')}/{stage_key('train') if is_kept_only else ARTIFACTS}"
    if is_kept_only:
        folder = "adapter" if config.method == "lora" else "model"
    else:
        folder = "adapter" if there.adapter and not (there.upstream or there.hf) else _whole(there)
    fetch, path = _fetched(root, folder)
    if config.model.kind == "retrieval":
        yield Use("Fetch the model; README.md beside it has the code to load it", _chain(fetch, ["ls", path]))
        return
    if folder != "adapter":
        yield Use("Chat with it", _chain(fetch, _chat("--model", path)))
        yield from _loading(path, is_hf=not there.upstream)
        return
    fetch_base, base = _base(config.model.source)
    yield Use("Chat with it", _chain(fetch_base, fetch, _chat("--model", base, "--adapter", path)))
    if not is_kept_only:
        place = f"{root}/{RUN_CONFIG}"
        copy = copy_file(place, RUN_CONFIG) or ["cp", f"{_path(root)}/{RUN_CONFIG}", RUN_CONFIG]
        merge = ["internvl-trainer", "merge", "--config", RUN_CONFIG]
        what = f"Merge it into a whole model: write merge: {{formats: [hf]}} into the copied {RUN_CONFIG} first"
        yield Use(what, "\n".join([join(copy), join(merge)]))


def _loading(path: str, *, is_hf: bool) -> Iterator[Use]:
    native = path if is_hf else "model-hf"
    convert = [] if is_hf else ["internvl-trainer", "convert", path, native, "--to", "hf"]
    what = "Load it with transformers (5.0 or newer)"
    yield Use(
        what if is_hf else f"{what}, in its format", _chain(convert, ["python", "-c", _LOAD.format(json.dumps(native))])
    )


def _report(record: Record) -> Use:
    """In a cluster by kubectl, else by the trainer's own command."""
    config = record.config
    if config.job_uid == LOCAL_UID:
        return Use("Write this report again", "internvl-trainer report --config run.yaml --out report")
    namespace, _, name = config.job.rpartition("/")
    place = ["-n", namespace] if namespace else []
    if config.output.startswith("s3://"):
        return Use("Fetch this report", join(["kubectl", "ivft", "report", name, *place, "--out", "report.html"]))
    return Use("Say where this report is", join(["kubectl", "ivft", "report", name, *place]))


def _chat(*options: str) -> list[str]:
    return ["internvl-trainer", "chat", *options, "--image", "photo.jpg"]


def _whole(there: Contents) -> str:
    return "model-hf" if there.hf and not there.upstream else "model"


def _fetched(root: str, name: str) -> tuple[list[str], str]:
    """The command that copies a folder from object storage (empty where it is on a disk), and its path."""
    return copy_folder(f"{root}/{name}", name) or ([], f"{_path(root)}/{name}")


def _base(source: str) -> tuple[list[str], str]:
    """The command that fetches the base model (empty where it is on a disk), and its path."""
    if match := _HUB.fullmatch(source):
        revision = ["--revision", match["revision"]] if match["revision"] else []
        return ["hf", "download", match["name"], *revision, "--local-dir", "base"], "base"
    return copy_folder(source, "base") or ([], _path(source))


def _path(uri: str) -> str:
    try:
        return str(local_path(uri, field="output"))
    except UserError:
        return uri


def _chain(*parts: list[str]) -> str:
    """Commands one after the other, each only after the success of the one before."""
    return " && \\\n  ".join(join(part) for part in parts if part)
