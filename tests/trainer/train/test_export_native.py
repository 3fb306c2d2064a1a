"""What training writes goes by the format of its base model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from golden import checkpoint
from internvl_trainer.model.convert_checkpoint import convert_checkpoint
from internvl_trainer.model.load import load_chat_model
from internvl_trainer.train.export import export_model
from trainer.contexts import Alone
from trainer.runs import make_config


def test_a_model_trained_from_the_hf_form_is_one_and_still_goes_back(tmp_path: Path) -> None:
    base = tmp_path / "base"
    convert_checkpoint(checkpoint("internlm2"), base, "hf")
    loaded = load_chat_model(base, dtype=torch.float32)
    with torch.no_grad():
        loaded.model.native.lm_head.weight.add_(1.0)
    engine: Any = SimpleNamespace(module=loaded.model)
    config = make_config("/out", image={"maxDynamicPatch": 3})
    group = Alone()
    assert list(export_model(engine, loaded, base, tmp_path / "tuned", config, group))
    convert_checkpoint(tmp_path / "tuned", tmp_path / "back", "upstream")
    wanted = loaded.model.native.state_dict()
    for directory in ("tuned", "back"):
        found = load_chat_model(tmp_path / directory, dtype=torch.float32).model.native.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["model_type"] == "internvl"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["max_dynamic_patch"] == 3
