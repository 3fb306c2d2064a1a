"""Which base model a run was trained on: told by the content of its files, so that a changed one is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.sources import describe_directory
from internvl_trainer.errors import UserError
from internvl_trainer.model.load import KEPT_FOLDER

_FIELD = "spec.model.source"
# What decides how a model computes: weights, configuration, tokenizer. A mended model card or *.py changes nothing.
_DECIDING = {".safetensors", ".json", ".model", ".txt"}


def describe_base(config: RunConfig) -> dict[str, Any]:
    """{"source": URI, "digest": hex sha256 of `files`, "files": {name: version}}, as JSON for a manifest.

    Cheap for the Hub (a commit, or its digests) and for s3:// and https:// (ETag and size). A folder's files are read
    and hashed, at about a gigabyte a second and core: call it on one rank only.
    """
    files = describe_directory(config.model.source, _decides, field=_FIELD)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return {"source": config.model.source, "digest": digest, "files": files}


def check_base(config: RunConfig, recorded: Mapping[str, Any] | None) -> None:
    """Raises UserError BaseModelChanged unless the base is what `describe_base` found when the run was trained.

    Args:
        recorded: `extra.get("base")` of the train stage's manifest; None passes, as an older version wrote none.
    """
    if recorded is None:
        return
    found = describe_base(config)
    if found["digest"] == recorded["digest"]:
        return
    before, now = recorded["files"], found["files"]
    name = min(name for name in {*before, *now} if before.get(name) != now.get(name))
    what = "is new" if name not in before else "is gone" if name not in now else "differs"
    raise UserError(
        "BaseModelChanged",
        f"the base model is not the one that was trained on: its digest is {found['digest']}, at training it was "
        f"{recorded['digest']} ({name} {what}); put the old files back, or train again with another output",
        config.model.source,
    )


def _decides(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in _DECIDING and str(path.parent) in (".", KEPT_FOLDER) and not path.name.startswith(".")
