"""Identity of the base model that a run was trained on, from its files, to refuse a changed one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.sources import describe_directory
from internvl_trainer.errors import UserError
from internvl_trainer.model.checkpoint_source import KEPT_FOLDER

_FIELD = "spec.model.source"
# Files that decide what a model computes: weights, configuration, tokenizer. Model card and *.py do not.
_DECIDING = {".safetensors", ".json", ".model", ".txt"}


def describe_base(config: RunConfig) -> dict[str, Any]:
    """{"source": URI, "digest": hex sha256 of `files`, "files": {name: version}}, as JSON for a manifest.

    The Hub answers with a commit or digests, object stores and https:// with ETag and size. A local folder's files are
    hashed at about 1 GB/s, so call it on one rank only.
    """
    files = describe_directory(config.model.source, _decides, field=_FIELD)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return {"source": config.model.source, "digest": digest, "files": files}


def check_base(config: RunConfig, recorded: Mapping[str, Any]) -> None:
    """Raises UserError BaseModelChanged unless the base model equals the one that the run was trained on.

    Args:
        recorded: `extra["base"]` of the train stage's manifest.
    """
    compare_bases(recorded, describe_base(config))


def compare_bases(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises UserError BaseModelChanged unless two results of describe_base are equal."""
    if found["digest"] == recorded["digest"]:
        return
    before, now = recorded["files"], found["files"]
    name = min(name for name in {*before, *now} if before.get(name) != now.get(name))
    what = "is new" if name not in before else "is gone" if name not in now else "differs"
    raise UserError(
        "BaseModelChanged",
        f"the base model is not the one that was trained on: its digest is {found['digest']}, at training it was "
        f"{recorded['digest']} ({name} {what}); put the old files back, or train again with another output",
        found["source"],
    )


def _decides(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in _DECIDING and str(path.parent) in (".", KEPT_FOLDER) and not path.name.startswith(".")
