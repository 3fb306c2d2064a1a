"""The Python of docs/guides/loading.md, run as it stands on a tiny model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from golden import GOLDEN, checkpoint, load
from internvl_trainer.__main__ import main
from internvl_trainer.data.pictures import decode_image
from internvl_trainer.data.tiling import cut_tiles
from internvl_trainer.model.adapter_files import save_adapter
from internvl_trainer.model.adapters import LoraSettings, apply_method, is_adapter
from internvl_trainer.model.greedy_answers import answer
from safetensors.torch import save_file

PAGE = Path(__file__).parents[2] / "docs/guides/loading.md"
QUESTION = "<image>\nProvide a one-sentence caption for the provided image."


def snippet(heading: str) -> str:
    """The Python block under a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}", 1)[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(code)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code.replace("bfloat16", "float32"), str(PAGE), "exec"), names)  # comparable to the last word
    return names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture, where the guide's commands have been given."""
    shutil.copy(GOLDEN / "data/images/photo.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_hf_format_answers_as_the_trainer_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(checkpoint("internlm2")), "model-hf", "--to", "hf"]) == 0
    capsys.readouterr()
    run(snippet("The hf format"))
    tiles = cut_tiles(decode_image((folder / "photo.jpg").read_bytes()), 56, 1, 6, thumbnail=True)
    loaded = load("internlm2")
    loaded.model.eval()
    wanted = answer(loaded, QUESTION, tiles, [len(tiles)], max_new_tokens=30, min_new_tokens=8)
    said = capsys.readouterr().out.strip()
    assert said
    assert said == wanted


def test_peft_puts_the_adapter_and_the_projector_that_learned_on_their_base(folder: Path) -> None:
    trained = load("internlm2").model
    apply_method(trained, "lora", lora=LoraSettings(language_rank=4))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in trained.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.1)
        projector = trained.projector.linear_1.weight
        projector += 1
    trained.eval()
    save_adapter(trained, folder / "adapter")
    others = {"model.multi_modal_projector.linear_1.weight": projector}
    save_file(others, folder / "adapter/trained_weights.safetensors")
    assert main(["convert", str(checkpoint("internlm2")), "base-hf", "--to", "hf"]) == 0
    names = run(snippet("The adapter alone"))
    context = torch.full((4,), trained.native.config.image_token_id)
    ids = torch.cat([torch.arange(3, 20), context, torch.arange(20, 30)])[None]
    tile = torch.linspace(-2, 2, 3 * 56 * 56).view(1, 3, 56, 56)
    with torch.no_grad():
        found = names["model"].get_base_model()(ids, tile, use_cache=False).logits
        wanted = trained.native(ids, tile, use_cache=False).logits
        projector -= 1
        unlearned = trained.native(ids, tile, use_cache=False).logits
    assert not torch.allclose(unlearned, wanted, atol=0.01), "the projector counts"
    assert_close(found, wanted)
    assert isinstance(names["base"], type(trained.native))
