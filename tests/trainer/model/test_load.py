"""Directories as users bring them, whole and broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from golden import checkpoint, load
from internvl_trainer.model.attention import SDPA
from internvl_trainer.model.checkpoint_format.files import CheckpointError
from internvl_trainer.model.load import load_chat_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

Breaker = Callable[[Path], None]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of one file, free to break."""
    return Path(shutil.copytree(checkpoint("internlm2"), tmp_path / "model"))


@pytest.fixture
def sharded(directory: Path) -> Path:
    """The same in three shards."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {
        name: f"model-0000{1 + position * 3 // len(names)}-of-00003.safetensors" for position, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def states_equal(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_shards_give_the_same_model_as_one_file(sharded: Path) -> None:
    assert states_equal(load_chat_model(sharded, dtype=torch.float32).model, load("internlm2").model)


def test_what_is_learnt_on_the_way(directory: Path) -> None:
    loaded = load_chat_model(directory)
    assert (loaded.kind, loaded.template, loaded.image_size, loaded.context_tokens) == (
        "internlm2",
        "internlm2-chat",
        56,
        4,
    )
    assert loaded.attn_implementation == SDPA
    assert loaded.upstream_config == json.loads((directory / "config.json").read_text())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.native.config.image_token_id == 431


def test_a_native_export_loads_in_transformers_and_here(directory: Path, tmp_path: Path) -> None:
    ours = load_chat_model(directory, dtype=torch.float32)
    ours.model.native.save_pretrained(tmp_path / "native")
    ours.tokenizer.save_pretrained(tmp_path / "native")
    ids = torch.arange(3, 40)[None]
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "native", dtype=torch.float32)
    again = load_chat_model(tmp_path / "native", dtype=torch.float32)
    with torch.no_grad():
        wanted = ours.model(ids, return_logits=True).logits
        assert wanted is not None
        assert_close(theirs(ids, use_cache=False).logits, wanted)
        assert torch.equal(again.model(ids, return_logits=True).logits, wanted)
    assert again.tokenizer("hello there").input_ids == ours.tokenizer("hello there").input_ids


def test_code_in_the_directory_is_never_run(directory: Path) -> None:
    for file in ("modeling_internvl_chat.py", "configuration_internvl_chat.py", "tokenization_internlm2.py"):
        (directory / file).write_text("raise SystemExit('remote code ran')")
    assert load_chat_model(directory).kind == "internlm2"


def test_loaded_weights_do_not_follow_the_file(directory: Path) -> None:
    loaded = load_chat_model(directory, dtype=torch.float32)
    before = loaded.model.native.lm_head.weight.detach().clone()
    (directory / "model.safetensors").write_bytes(b"\0" * (directory / "model.safetensors").stat().st_size)
    assert torch.equal(loaded.model.native.lm_head.weight, before)


def test_another_tile_size_resizes_the_position_embeddings() -> None:
    plain, larger = load("internlm2"), load("internlm2", image_size=112)
    assert larger.context_tokens == 16
    old = plain.model.vision_tower.embeddings.position_embeddings
    new = larger.model.vision_tower.embeddings.position_embeddings
    assert new.shape == (1, 1 + 64, 32)
    assert torch.equal(new[:, 0], old[:, 0])
    # Bicubic interpolation keeps the mean of a grid roughly, and the corners near their values.
    torch.testing.assert_close(new[:, 1:].mean(1), old[:, 1:].mean(1), atol=5e-3, rtol=0)
    tile = torch.zeros(1, 3, 112, 112)
    assert larger.model.encode_tiles(tile).shape == (1, 16, 64)


def test_rotary_frequencies_stay_fp32_when_weights_are_cast() -> None:
    """DeepSpeed casts whole modules; frequencies rounded to bf16 would shift every position."""
    model = load("internlm2").model
    wanted = model.language_model.rotary_emb.inv_freq.clone()
    cast = model.bfloat16()
    assert cast.native.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(cast.language_model.rotary_emb.inv_freq, wanted)


def remove(file: str) -> Breaker:
    return lambda directory: (directory / file).unlink()


def write(file: str, text: str) -> Breaker:
    def change(directory: Path) -> None:
        (directory / file).write_text(text)

    return change


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:400_000])


def change_config(**changes: object) -> Breaker:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            part, _, field = key.partition("__")
            if field:
                config[part][field] = value
            else:
                config[part] = value
        path.write_text(json.dumps(config))

    return change


def change_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Breaker:
    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


NORM = "language_model.model.norm.weight"


def quantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = tensors[NORM].to(torch.int8)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = torch.zeros(65)


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


def forget_image_tokens(directory: Path) -> None:
    for file in ("added_tokens.json", "special_tokens_map.json"):
        (directory / file).unlink()
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("added_tokens_decoder")
    config.pop("additional_special_tokens")
    path.write_text(json.dumps(config))


def remove_qwen_vocabulary(directory: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(checkpoint("qwen2"), directory)
    (directory / "merges.txt").unlink()


BROKEN = [
    pytest.param(
        remove("config.json"),
        "FileMissing",
        "config.json: config.json is missing; give the directory of a checkpoint",
        id="no config",
    ),
    pytest.param(
        write("config.json", "{"),
        "InvalidJson",
        "config.json: not valid JSON: Expecting property name enclosed in double quotes (column 2); "
        "copy the file from the model's repository again",
        id="broken config",
    ),
    pytest.param(
        change_config(llm_config__model_type="mamba"),
        "UnsupportedArchitecture",
        "config.json: llm_config.model_type is 'mamba'; supported are qwen2, internlm2, llama, phi3",
        id="unknown language model",
    ),
    pytest.param(
        change_config(model_type="llava"),
        "UnsupportedArchitecture",
        "config.json: model_type is 'llava'; "
        "expected 'internvl_chat' (upstream's format) or 'internvl' (transformers' own)",
        id="unknown model",
    ),
    pytest.param(
        remove("model.safetensors"),
        "WeightsMissing",
        "model: neither model.safetensors nor model.safetensors.index.json is there; download the weights again",
        id="no weights",
    ),
    pytest.param(
        only_pickles,
        "PickledWeights",
        "model: only pickled weights found (pytorch_model.bin); pickle can run code and is never read. "
        "Convert them to safetensors first",
        id="pickled weights",
    ),
    pytest.param(
        cut,
        "InvalidSafetensors",
        "model.safetensors: cannot be read as safetensors, 400000 bytes found (",
        id="truncated",
    ),
    pytest.param(
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "InvalidSafetensors",
        "model.safetensors: is a git-lfs pointer, not the weights; run `git lfs pull` in the clone it comes from",
        id="git-lfs pointer",
    ),
    pytest.param(
        change_tensors(quantize),
        "UnsupportedDtype",
        f"model.safetensors: tensor {NORM} has dtype I8; expected one of F32, F16, BF16. "
        "Use the unquantized checkpoint",
        id="dtype",
    ),
    pytest.param(
        change_tensors(widen),
        "ShapeMismatch",
        f"model.safetensors: tensor {NORM} has shape [65]; "
        "config.json asks for model.language_model.norm.weight to be [64], found [65]. "
        "Check that config.json and the weights belong together",
        id="shape",
    ),
    pytest.param(
        change_tensors(lambda tensors: tensors.pop(NORM)),
        "TensorMissing",
        f"model: tensor {NORM} is in no weight file (1 of 67 are missing); download the weights again",
        id="tensor missing",
    ),
    pytest.param(
        change_tensors(lambda tensors: tensors.update({"visual.extra": torch.zeros(2)})),
        "UnknownTensor",
        "model.safetensors: tensor 'visual.extra' belongs to no part of a internlm2 InternVL model; "
        "is config.json of this model?",
        id="tensor unknown",
    ),
    pytest.param(
        change_config(llm_config__num_hidden_layers=1),
        "UnknownTensor",
        "model.safetensors: tensor language_model.model.layers.1.attention.wo.weight has no place in the model that "
        "config.json describes (as model.language_model.layers.1.self_attn.o_proj.weight); "
        "check that config.json and the weights belong together",
        id="too many layers",
    ),
    pytest.param(
        remove("tokenizer_config.json"),
        "FileMissing",
        "tokenizer_config.json: tokenizer_config.json is missing; "
        "copy the tokenizer's files from the model's repository",
        id="no tokenizer config",
    ),
    pytest.param(
        remove("tokenizer.model"),
        "TokenizerFileMissing",
        "tokenizer.model: tokenizer.model is missing; copy the tokenizer's files from the model's repository",
        id="no sentencepiece model",
    ),
    pytest.param(
        remove_qwen_vocabulary,
        "TokenizerFileMissing",
        "merges.txt: merges.txt is missing; copy the tokenizer's files from the model's repository",
        id="no merges",
    ),
    pytest.param(
        write("tokenizer.model", "version https://git-lfs.github.com/spec/v1\n"),
        "TokenizerFileMissing",
        "tokenizer.model: is a git-lfs pointer",
        id="tokenizer is a git-lfs pointer",
    ),
    pytest.param(
        forget_image_tokens,
        "ImageTokenMissing",
        "tokenizer_config.json: the tokenizer does not know <img>, </img>, <IMG_CONTEXT>; "
        "use the tokenizer of an InternVL chat model",
        id="no image tokens",
    ),
]


@pytest.mark.parametrize(("breaker", "reason", "message"), BROKEN)
def test_a_broken_directory(directory: Path, breaker: Breaker, reason: str, message: str) -> None:
    breaker(directory)
    with pytest.raises(CheckpointError) as caught:
        load_chat_model(directory)
    assert caught.value.reason == reason
    where = directory if message.startswith("model: ") else directory / message.split(": ")[0]
    assert str(caught.value).startswith(f"{where}: {message.partition(': ')[2]}")


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_chat_model(tmp_path / "no")
    assert str(caught.value) == (
        f"{tmp_path / 'no' / 'config.json'}: config.json is missing; give the directory of a checkpoint"
    )


def lose_shard(directory: Path) -> None:
    (directory / "model-00002-of-00003.safetensors").unlink()


def swap_shards(directory: Path) -> None:
    shutil.copy(directory / "model-00001-of-00003.safetensors", directory / "model-00002-of-00003.safetensors")


def point_outside(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = "../../other.safetensors"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("breaker", "reason", "message"),
    [
        pytest.param(
            lose_shard,
            "ShardMissing",
            "model-00002-of-00003.safetensors: shard 2 of 3 is missing "
            "(model.safetensors.index.json lists 18 tensors in it); download it again",
            id="lost",
        ),
        pytest.param(
            swap_shards,
            "TensorMissing",
            "model-00002-of-00003.safetensors: model.safetensors.index.json says that tensor mlp1.1.bias "
            "is in this file, but it is not; download both again",
            id="wrong shard",
        ),
        pytest.param(
            point_outside,
            "InvalidIndex",
            "model.safetensors.index.json: weight_map names '../../other.safetensors'; "
            "expected the name of a .safetensors file beside the index",
            id="index points outside",
        ),
        pytest.param(
            write("model.safetensors.index.json", "{}"),
            "InvalidIndex",
            "model.safetensors.index.json: weight_map is missing or empty; download the file again",
            id="empty index",
        ),
    ],
)
def test_broken_shards(sharded: Path, breaker: Breaker, reason: str, message: str) -> None:
    breaker(sharded)
    with pytest.raises(CheckpointError) as caught:
        load_chat_model(sharded)
    assert (caught.value.reason, str(caught.value)) == (reason, f"{sharded}/{message}")
