"""The formats of the model that a run publishes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from internvl_trainer.stage_store import StageStore


@dataclass(frozen=True)
class Contents:
    """The formats that are stored beside the card."""

    adapter: bool
    upstream: bool
    hf: bool

    def at_root(self, formats: Sequence[str]) -> Contents:
        """The one of them that goes to the root of a Hub repository; see hub_upload.files_for_hub."""
        chosen = next((name for name in (*formats, "upstream", "adapter") if getattr(self, name)), None)
        return Contents(**{name: name == chosen for name in ("adapter", "upstream", "hf")})


def contents(stages: StageStore) -> Contents:
    """The folders that publishing writes: adapter/ and model/ of training, model/ and model-hf/ of merging."""
    config = stages.config
    formats = config.merge.formats
    if config.method == "lora":
        return Contents(adapter=True, upstream="upstream" in formats, hf="hf" in formats)
    trained = stages.find("train")
    has_config = trained is not None and trained.named("model/config.json")
    document = json.loads(stages.storage.read(stages.key("train", "model/config.json"))) if has_config else {}
    # A base in transformers' format keeps it. InternVL 1.0 in upstream's format has the same model_type.
    is_native = document.get("model_type") == "internvl" and config.model.kind == "chat"
    return Contents(adapter=False, upstream="upstream" in formats or not is_native, hf="hf" in formats)
