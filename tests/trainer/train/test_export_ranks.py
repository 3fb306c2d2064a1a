"""Two ranks export one model together, whether or not its parameters are partitioned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from internvl_trainer.model.convert_checkpoint import convert_checkpoint
from safetensors.torch import load_file
from trainer.artifacts.web_server import S3StandIn, serving
from trainer.runs import GOLDEN, environment
from trainer.train.export_worker import SHARDS, split
from trainer.train.test_training import _LAUNCH

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("form", ["upstream", "hf"])
def test_two_ranks_export_the_same_model_under_zero_1_and_zero_3(tmp_path: Path, form: str) -> None:
    whole = GOLDEN / "checkpoints" / "qwen2"
    if form == "hf":
        convert_checkpoint(whole, tmp_path / "whole", "hf")
        whole = tmp_path / "whole"
    base = tmp_path / "base"
    split(whole, base)
    server = S3StandIn()
    server.files = {
        f"/models/base/{path.relative_to(base).as_posix()}": path.read_bytes()
        for path in base.rglob("*")
        if path.is_file()
    }
    command = [sys.executable, "-c", _LAUNCH, str(Path(__file__).with_name("export_worker.py")), str(tmp_path)]
    with serving(server):
        env = environment(tmp_path, **server.environment())
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    weights = [request for request in server.requests if request.path.endswith(".safetensors")]
    assert weights
    assert all(request.range for request in weights)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    stage = "stages/train"
    one, three = (json.loads((tmp_path / f"zero{zero}" / stage / "manifest.json").read_text()) for zero in (1, 3))
    names = [file["path"] for file in one["files"] if file["path"].startswith("model/")]
    assert names == [file["path"] for file in three["files"] if file["path"].startswith("model/")]
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) == SHARDS
    assert len(set(names)) == len(names)
    assert "model/config.json" in names
    for name in shards:
        first, second = (load_file(tmp_path / f"zero{zero}" / stage / name) for zero in (1, 3))
        assert first.keys() == second.keys() == load_file(base / Path(name).name).keys()
        for key, tensor in first.items():
            torch.testing.assert_close(second[key], tensor, atol=1e-5, rtol=0)
    for zero in (1, 3):
        written = [json.loads((tmp_path / f"zero{zero}-rank{rank}.json").read_text()) for rank in (0, 1)]
        assert written == [[Path(name).name for name in sorted(shards)[rank::2]] for rank in (0, 1)]
