"""Checkpoint URIs whose files can be read in parts."""

from __future__ import annotations

from internvl_api.address import OBJECT_STORES, Address, reveal

from internvl_trainer.artifacts import hub
from internvl_trainer.artifacts.https import HttpsSource
from internvl_trainer.artifacts.ranges import RangeSource
from internvl_trainer.artifacts.storage import open_object_storage


def open_ranges(uri: str, *, field: str) -> RangeSource | None:
    """The files of a checkpoint URI, to be read in parts; None for a folder that is read in place."""
    uri = Address(uri)
    if uri.startswith("hf://"):
        repo = hub.repository(uri, field=field)
        return hub.HubFiles(repo, hub.commit_of(repo))
    if uri.startswith("https://"):
        return HttpsSource(uri, field=field)
    return open_object_storage(reveal(uri), field=field) if uri.startswith(OBJECT_STORES) else None
