"""`internvl-trainer convert`: upstream's format to transformers' own, and back."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from golden import CASES, GOLDEN, KINDS, ROWS, checkpoint, load, sample
from internvl_trainer.__main__ import main
from internvl_trainer.data.collate import collate
from internvl_trainer.data.row_schema import Turn
from internvl_trainer.data.tiling import cut_tiles
from internvl_trainer.model.chat_model import normalise_tiles
from internvl_trainer.model.greedy_answers import end_of_answer, make_prompt
from internvl_trainer.model.load import load_chat_model
from internvl_trainer.model.tokenizer import decode_answer
from PIL import Image
from safetensors.torch import load_file, save_file
from trainer.answers import answer_all
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, InternVLProcessor

pytestmark = pytest.mark.slow

INDEX = "model.safetensors.index.json"
NORM = "language_model.model.norm.weight"
TEXT = "Hello there, <img><IMG_CONTEXT></img> 你好 {x: 1}\n\n  two  spaces"


def convert(source: Path, target: Path, to: str, *more: str) -> int:
    return main(["convert", str(source), str(target), "--to", to, *more])


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def copy(kind: str, target: Path) -> Path:
    """A golden checkpoint without the arrays beside it, free to break."""
    return Path(shutil.copytree(checkpoint(kind), target, ignore=shutil.ignore_patterns("*.npz")))


def cut_in_shards(directory: Path, count: int = 3) -> None:
    """In an order of its own, so that parts of one layer lie in several files."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: name[::-1])
    files = {
        name: f"model-{1 + place * count // len(names):05}-of-{count:05}.safetensors"
        for place, name in enumerate(names)
    }
    for file in set(files.values()):
        own = {name: tensors[name] for name in names if files[name] == file}
        save_file(own, directory / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharded", [pytest.param(False, id="one file"), pytest.param(True, id="shards")])
def test_there_and_back_every_file_is_equal_to_the_last_bit(kind: str, sharded: bool, tmp_path: Path) -> None:
    upstream = copy(kind, tmp_path / "upstream")
    if sharded:
        cut_in_shards(upstream)
    assert convert(upstream, tmp_path / "hf", "hf", "--shard-size", "200KB") == 0
    assert convert(tmp_path / "hf", tmp_path / "back", "upstream") == 0
    before, after = contents(upstream), contents(tmp_path / "back")
    if sharded:  # the order of names in an index says nothing
        assert json.loads(after[INDEX])["weight_map"] == json.loads(before[INDEX])["weight_map"]
        before.pop(INDEX), after.pop(INDEX)
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert {"modeling_internvl_chat.py", "configuration_internvl_chat.py"} < before.keys()


@torch.no_grad()
@pytest.mark.parametrize("case", [pytest.param(case, id=case) for case in CASES])
def test_plain_transformers_computes_the_same_from_the_hf_form(case: str, tmp_path: Path) -> None:
    kind = case.split("/")[0]
    assert convert(checkpoint(kind), tmp_path / "hf", "hf", "--shard-size", "200KB") == 0
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours, again = load(kind), load_chat_model(tmp_path / "hf", dtype=torch.float32)
    for row in range(len(ROWS)):
        batch = collate([sample(case, row)])
        wanted = ours.model.eval()(**batch, return_logits=True).logits
        real = batch["pixel_values"][batch["image_flags"].bool()]
        pixels = {"pixel_values": normalise_tiles(real)} if len(real) else {}
        found = theirs(batch["input_ids"], use_cache=False, **pixels).logits
        assert_close(found, wanted)
        assert torch.equal(again.model.eval()(**batch, return_logits=True).logits, wanted)
    assert (again.template, again.image_size, again.kind) == (ours.template, ours.image_size, ours.kind)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_reads_the_tokenizer_of_the_hf_form(kind: str, tmp_path: Path) -> None:
    assert convert(checkpoint(kind), tmp_path / "hf", "hf") == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = load(kind).tokenizer
    for text in (TEXT, f" {TEXT}"):
        assert theirs(text).input_ids == ours(text).input_ids


def test_transformers_image_processor_cuts_the_same_tiles(tmp_path: Path) -> None:
    assert convert(checkpoint("qwen2"), tmp_path / "hf", "hf") == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    picture = Image.open(sorted((GOLDEN / "data/images").iterdir())[0]).convert("RGB")
    ours = cut_tiles(picture, 56, 1, processor.max_patches, thumbnail=True)
    theirs = processor(picture, return_tensors="pt").pixel_values
    assert len(ours) > 2
    assert_close(theirs, normalise_tiles(torch.from_numpy(ours)))


def test_the_generation_config_is_carried_over(tmp_path: Path) -> None:
    upstream = copy("internlm2", tmp_path / "upstream")
    (upstream / "generation_config.json").write_text('{"eos_token_id": [2, 428]}')
    assert convert(upstream, tmp_path / "hf", "hf") == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == [2, 428]


def test_code_is_carried_along_and_never_run(tmp_path: Path) -> None:
    upstream = copy("internlm2", tmp_path / "upstream")
    code = b"raise SystemExit('remote code ran')\r\n"
    (upstream / "modeling_internvl_chat.py").write_bytes(code)
    assert convert(upstream, tmp_path / "hf", "hf") == 0
    assert sorted(path.name for path in (tmp_path / "hf").glob("*.py")) == []
    assert convert(tmp_path / "hf", tmp_path / "back", "upstream") == 0
    assert (tmp_path / "back" / "modeling_internvl_chat.py").read_bytes() == code


@pytest.mark.parametrize("kind", ["internlm2", "phi3"])
def test_what_transformers_saved_goes_back_with_a_base(kind: str, tmp_path: Path) -> None:
    """Trained elsewhere, and saved without upstream's files."""
    trained = load(kind).model.native
    torch.nn.init.normal_(trained.lm_head.weight, generator=torch.Generator().manual_seed(1))
    trained.save_pretrained(tmp_path / "hf")
    base = copy(kind, tmp_path / "base")
    assert convert(tmp_path / "hf", tmp_path / "back", "upstream", "--base", str(base)) == 0
    assert contents(tmp_path / "back").keys() == contents(base).keys()
    back, wanted = load_chat_model(tmp_path / "back", dtype=torch.float32).model.native.state_dict(), trained
    assert all(torch.equal(back[name], tensor) for name, tensor in wanted.state_dict().items())


def test_mixed_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    upstream = copy("qwen2", tmp_path / "upstream")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(upstream / "model.safetensors").items()}
    tensors[NORM] = tensors[NORM].float()
    save_file(tensors, upstream / "model.safetensors", metadata={"format": "pt"})
    assert convert(upstream, tmp_path / "hf", "hf") == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "hf" / "model.safetensors")["model.language_model.norm.weight"].dtype == torch.float32
    assert convert(tmp_path / "hf", tmp_path / "back", "upstream") == 0
    assert contents(tmp_path / "back") == contents(upstream)


def test_no_file_is_larger_than_asked_for(tmp_path: Path) -> None:
    assert convert(checkpoint("internlm2"), tmp_path / "hf", "hf", "--shard-size", "200KB") == 0
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 200_000


# --- wrong input ---

Breaker = Callable[[Path], object]


def change_config(**changes: object) -> Breaker:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Breaker:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors")

    return change


def lose_shard(directory: Path) -> None:
    cut_in_shards(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:400_000])


POSITIONS = "vision_model.embeddings.position_embedding"
BROKEN = [
    pytest.param(
        lose_shard,
        "ShardMissing: {}/model-00002-of-00003.safetensors: shard 2 of 3 is missing "
        f"({INDEX} lists 18 tensors in it); download it again",
        id="missing shard",
    ),
    pytest.param(
        truncate,
        "InvalidSafetensors: {}/model.safetensors: cannot be read as safetensors, 400000 bytes found (",
        id="truncated",
    ),
    pytest.param(
        change_tensors(lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.int8)})),
        "UnsupportedDtype: {}/model.safetensors: "
        f"tensor {NORM} has dtype I8; expected one of F32, F16, BF16. Use the unquantized checkpoint",
        id="wrong dtype",
    ),
    pytest.param(
        lambda directory: (directory / "tokenizer.model").unlink(),
        "TokenizerFileMissing: {}/tokenizer.model: tokenizer.model is missing; "
        "copy the tokenizer's files from the model's repository",
        id="absent tokenizer file",
    ),
    pytest.param(
        change_config(model_type="llava"),
        "UnsupportedArchitecture: {}/config.json: model_type is 'llava'; "
        "expected 'internvl_chat' (upstream's format) or 'internvl' (transformers' own)",
        id="neither format",
    ),
    pytest.param(
        lambda directory: (directory / "config.json").unlink(),
        "FileMissing: {}/config.json: config.json is missing; give the directory of a checkpoint",
        id="no config",
    ),
    pytest.param(
        change_config(ps_version="v1"),
        "NotExpressible: {}/config.json: ps_version is 'v1'; transformers' InternVL knows only the pixel shuffle 'v2' "
        "and would compute something else. Keep this model in upstream's format",
        id="pixel shuffle v1",
    ),
    pytest.param(
        change_tensors(lambda tensors: tensors.update({POSITIONS: torch.zeros(1, 65, 32)})),
        f"ShapeMismatch: {{}}/model.safetensors: tensor {POSITIONS} has shape [1, 65, 32]; "
        "config.json asks for model.vision_tower.embeddings.position_embeddings to be [1, 17, 32], "
        "found [1, 65, 32]. Check that config.json and the weights belong together",
        id="positions of another tile size",
    ),
]


@pytest.mark.parametrize(("breaker", "message"), BROKEN)
def test_a_broken_source_is_refused_and_leaves_nothing(
    breaker: Breaker, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("internlm2", tmp_path / "source")
    breaker(source)
    assert convert(source, tmp_path / "hf", "hf") == 65
    assert capsys.readouterr().err.startswith(message.format(source))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def occupied(tmp_path: Path) -> Path:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    return tmp_path / "full"


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("target", "to", "message"),
    [
        pytest.param(
            occupied,
            "hf",
            "TargetNotEmpty: {tmp}/full: found 1 entries, such as notes.txt; "
            "name a directory that is empty or not there\n",
            id="not empty",
        ),
        pytest.param(
            a_file,
            "hf",
            "TargetExists: {tmp}/file: is a file; name a directory that is empty or not there\n",
            id="a file",
        ),
        pytest.param(
            lambda tmp_path: tmp_path / "new",
            "upstream",
            "SameFormat: {source}: is in the upstream format already; there is nothing to convert\n",
            id="same format",
        ),
    ],
)
def test_a_target_that_cannot_be(
    target: Callable[[Path], Path], to: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(checkpoint("qwen2"), target(tmp_path), to) == 65
    assert capsys.readouterr().err == message.format(tmp=tmp_path, source=checkpoint("qwen2"))


def test_an_empty_target_is_filled(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    assert convert(checkpoint("qwen2"), tmp_path / "hf", "hf") == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_without_upstreams_files_the_way_back_needs_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("qwen2").model.native.save_pretrained(tmp_path / "hf")
    capsys.readouterr()
    assert convert(tmp_path / "hf", tmp_path / "back", "upstream") == 65
    assert capsys.readouterr().err == (
        f"UpstreamFilesMissing: {tmp_path}/hf: there is no upstream/config.json in it, which `convert --to hf` keeps; "
        "give --base a directory in upstream's format of the same model, for its config.json, tokenizer and *.py\n"
    )


# --- memory ---

_MEASURE = """
import resource, sys
from pathlib import Path
from internvl_trainer.model.convert_checkpoint import convert_checkpoint
warm, source, folder = map(Path, sys.argv[1:])
convert_checkpoint(warm, folder / "warm", "hf")
convert_checkpoint(folder / "warm", folder / "warm-back", "upstream")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint(source, folder / "hf", "hf", shard_size=32_000_000)
convert_checkpoint(folder / "hf", folder / "back", "upstream")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def grow(directory: Path, layers: int) -> None:
    """The golden InternLM2 with wide layers, one a shard of 31 MB."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    wide = {"intermediate_size": 40_000, "num_hidden_layers": layers}
    path.write_text(json.dumps(config | {"llm_config": config["llm_config"] | wide}))
    tensors = load_file(directory / "model.safetensors")
    prefix = "language_model.model.layers."
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    layer = {name.removeprefix(f"{prefix}0."): tensor for name, tensor in tensors.items() if f"{prefix}0." in name}
    layer |= {f"feed_forward.{name}.weight": torch.zeros(40_000, 64) for name in ("w1", "w3")}
    layer["feed_forward.w2.weight"] = torch.zeros(64, 40_000)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number in range(layers):
        own = {f"{prefix}{number}.{name}": tensor for name, tensor in layer.items()}
        own |= kept if number == 0 else {}
        file = f"model-{number + 1:05}-of-{layers:05}.safetensors"
        save_file(own, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_memory_is_of_two_shards_and_not_of_the_model(tmp_path: Path) -> None:
    """Of twelve shards of 31 MB, the process may hold two, and the allocator's leavings."""
    source = copy("internlm2", tmp_path / "source")
    grow(source, layers=12)
    assert sum(file.stat().st_size for file in source.glob("*.safetensors")) > 350_000_000
    command = [sys.executable, "-c", _MEASURE, str(checkpoint("internlm2")), str(source), str(tmp_path)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    assert grown < 120_000_000


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """InternVLProcessor wants a video processor, which needs torchvision; pictures do not."""
    monkeypatch.setattr(InternVLProcessor, "check_argument_for_proper_class", lambda *_: None)


@pytest.mark.usefixtures("without_torchvision")
@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_asks_with_the_ids_of_our_own_prompts(case: str, tmp_path: Path) -> None:
    kind, template = case.split("/")
    upstream = copy(kind, tmp_path / "upstream")
    config = json.loads((upstream / "config.json").read_text())
    (upstream / "config.json").write_text(json.dumps({**config, "template": template}))
    assert convert(upstream, tmp_path / "hf", "hf") == 0
    settings = json.loads((tmp_path / "hf" / "processor_config.json").read_text())
    processor = InternVLProcessor(
        AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil"),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
        None,
        image_seq_length=settings["image_seq_length"],
        chat_template=(tmp_path / "hf" / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    picture = Image.open(GOLDEN / "data/images/wide.png").convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what colour is the cat"}]
    asked = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    loaded = load_chat_model(upstream, dtype=torch.float32)
    tiles = cut_tiles(picture, loaded.image_size, 1, processor.image_processor.max_patches, thumbnail=True)
    question = [Turn("human", "<image>\nwhat colour is the cat")]
    ours = make_prompt(loaded, question, tiles, [len(tiles)])
    assert asked["input_ids"][0].tolist() == ours.ids.tolist()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, len(ours.ids) :]
    (text,) = answer_all(loaded, [ours], max_new_tokens=8)
    end = end_of_answer(loaded, template)
    ids = theirs.tolist()
    assert end in (ends if isinstance(ends := model.generation_config.eos_token_id, list) else [ends])
    bos = loaded.model.native.config.text_config.bos_token_id
    start = [] if bos is None else [bos]  # our answers begin with it, as upstream's do; it is not part of what is new
    own = ids[: ids.index(end)] if end in ids else ids
    assert decode_answer(loaded.tokenizer, start + own).strip() == text
