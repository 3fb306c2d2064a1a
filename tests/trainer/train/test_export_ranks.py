"""Two ranks export one model together, whether or not its parameters are partitioned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer.artifacts.web_server import S3StandIn, serving
from trainer.runs import GOLDEN, environment
from trainer.train.export_worker import SHARDS, split
from trainer.train.test_training import _LAUNCH

pytestmark = pytest.mark.slow


def test_two_ranks_export_the_same_model_under_zero_1_and_zero_3(tmp_path: Path) -> None:
    split(GOLDEN / "checkpoints" / "qwen2", tmp_path / "base")
    server = S3StandIn()
    server.files = {f"/models/base/{path.name}": path.read_bytes() for path in (tmp_path / "base").iterdir()}
    command = [sys.executable, "-c", _LAUNCH, str(Path(__file__).with_name("export_worker.py")), str(tmp_path)]
    with serving(server):
        env = environment(tmp_path, **server.environment())
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
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
        assert first.keys() == second.keys() == load_file(tmp_path / "base" / Path(name).name).keys()
        for key, tensor in first.items():
            torch.testing.assert_close(second[key], tensor, atol=1e-5, rtol=0)
