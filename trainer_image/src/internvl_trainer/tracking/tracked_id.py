"""The id of the tracked run, kept in the output: the same for every stage and attempt that continues this run."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable

from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

from internvl_trainer.artifacts.fingerprint import fingerprint
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError

TRACKING = "tracking"
_FILE = f"{TRACKING}/run.json"
_ID = re.compile(r"[a-z0-9]{21}")  # SwanLab takes no other form


def tracked_id(config: RunConfig, storage: Storage, tell: Callable[[str], None]) -> str:
    """The id in the output; a new one for the first stage, and for another training in the same output."""
    mine = fingerprint(config)
    try:
        if (found := _read(storage, mine)) is not None:
            return found
        made = secrets.token_hex(11)[:21]
        storage.write(_FILE, json.dumps({"id": made, "fingerprint": mine}).encode())
        return made
    except UserError as error:
        tell(f"cannot keep the id of the tracked run: {error}")
        return mine[:21]


def offline_folder(stage: StageName, attempt: str | None) -> str:
    """Where in the output the files of a client without a server go; a name that no other attempt has."""
    return f"{TRACKING}/{stage}-{attempt or '1'}-{secrets.token_hex(4)}"


def _read(storage: Storage, mine: str) -> str | None:
    if storage.stat(_FILE) is None:
        return None
    try:
        kept = json.loads(storage.read_start(_FILE, 4096))
        found = kept["id"] if kept["fingerprint"] == mine else None
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and _ID.fullmatch(found) else None
