"""Upstream's checkpoint layout: read, written back bit for bit, resized; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from internvl_trainer.model.checkpoint_format.files import CheckpointError, list_tensors, read_tensor
from internvl_trainer.retrieval.load import load_retrieval_model
from retrieval_golden import CASES, batch, checkpoint, load, save_retrieval_model
from safetensors.torch import load_file, save_file
from torch.nn import functional


@pytest.mark.parametrize("shard_size", [pytest.param(10**9, id="one file"), pytest.param(10**5, id="shards")])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_equal_to_the_bit(case: str, shard_size: int, tmp_path: Path) -> None:
    save_retrieval_model(load(case), tmp_path, shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size < 10**9)
    written = {entry.name: read_tensor(entry) for entry in list_tensors(tmp_path)}
    original = load_file(checkpoint(case) / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (checkpoint(case) / "config.json").read_text()
    )


def test_position_embeddings_grow_and_the_directory_says_so(tmp_path: Path) -> None:
    """42 to 70 pixels: 3 x 3 to 5 x 5 patches, bicubic; what is saved loads at the new size without being told."""
    resized = load("cross-attention", image_size=70)
    save_retrieval_model(resized, tmp_path)
    name = "vision_model.embeddings.position_embedding"
    old = load_file(checkpoint("cross-attention") / "model.safetensors")[name]
    grid = old[:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    wanted = functional.interpolate(grid, size=5, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    written = load_file(tmp_path / "model.safetensors")[name]
    torch.testing.assert_close(written, torch.cat([old[:, :1], wanted], dim=1), atol=0, rtol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["force_image_size"], config["vision_config"]["image_size"]) == (70, 42)

    again = load_retrieval_model(tmp_path, dtype=torch.float32)
    assert again.image_size == 70
    pixels = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = (each.model.encode_images(pixels, ["G"])["G"] for each in (again, resized))
        assert torch.equal(found, wanted)


def test_weights_in_bf16_leave_rotary_frequencies_alone() -> None:
    model = load("cross-attention").model
    frequencies = model.qllama.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert torch.equal(model.qllama.model.rotary_emb.inv_freq, frequencies)
    with torch.no_grad():
        loss = model(**(batch("cross-attention") | {"pixel_values": torch.zeros(4, 3, 42, 42)})).loss
    assert loss.dtype == torch.float32  # the temperature would make bf16's rounding of cosines visible
    assert torch.isfinite(loss)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("cross-attention"), tmp_path / "checkpoint"))


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_old_checkpoints_may_store_rotary_buffers(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["qllama.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, directory / "model.safetensors")
    load_retrieval_model(directory)


def test_only_pickled_weights_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle can run code") as error:
        load_retrieval_model(directory)
    assert error.value.reason == "PickledWeights"


def test_a_missing_tensor_has_upstreams_name(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["vision_model.encoder.layers.1.attn.qkv.weight"]
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vision_model\S+1\.attn\.qkv\.weight is in no weight file"):
        load_retrieval_model(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"use_qllama_lora": 16}, "use_qllama_lora is 16: .* merge it", id="unmerged LoRA"),
        pytest.param({"qllama_config": None}, "qllama_config is missing or not an object", id="a chat model"),
        pytest.param({"cross_attention_frequency": 2}, "belong together", id="another frequency"),
    ],
)
def test_other_configs_are_refused(directory: Path, changes: dict[str, object], message: str) -> None:
    change_config(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_retrieval_model(directory)
