"""`internvl-trainer recipes` and `estimate`, as a user types them."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from crd_evaluator import rule_messages, schema_errors
from internvl_api.constants import API_VERSION, KIND
from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.recipes.summary import recipe_config
from internvl_trainer.__main__ import main


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run(*words: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(words)
    return code, printed.getvalue()


@pytest.mark.parametrize("words", [("recipes",), ("recipes", "list")])
def test_recipes_lists_every_recipe(words: tuple[str, ...]) -> None:
    code, text = run(*words)
    assert code == 0
    assert all(f" {name} " in text for name in recipe_names())
    assert "lora, rank 128" in text


def test_recipes_show() -> None:
    code, text = run("recipes", "show", "internvl2-2b-lora-coco")
    assert code == 0
    assert "languageRank: 128" in text
    assert "125,829,120 parameters" in text
    assert "9.1 GiB with typical rows" in text


@pytest.mark.parametrize("width", ["80", "120"])
def test_no_name_is_broken_on_a_narrow_terminal(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    code, text = run("recipes")
    assert code == 0
    lines = text.splitlines()
    assert max(map(len, lines)) <= int(width)
    starts = [line.split()[0] for line in lines if line.split()]
    assert set(recipe_names()) <= set(starts), "each name is whole, at the start of its line"
    assert lines[0].split() == ["recipe", "GPUs", "ZeRO", "micro", "global", "lr", "tokens", "tiles"]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_printed_as_an_api_server_takes_it(name: str) -> None:
    code, text = run("recipes", "show", name)
    assert code == 0
    resource = yaml.safe_load(text)
    assert (resource["apiVersion"], resource["kind"]) == (API_VERSION, KIND)
    assert resource["metadata"] == {"name": name}
    assert schema_errors(resource["spec"]) == []
    assert rule_messages(resource["spec"]) == []
    shown, recipe = (resolve(parse_spec(spec), job="a/b", job_uid="c") for spec in (resource["spec"], alone(resource)))
    assert shown == recipe, "its settings are those of the recipe"


def alone(resource: dict[str, Any]) -> dict[str, Any]:
    """The spec without the settings that repeat its recipe."""
    return {key: resource["spec"][key] for key in ("recipe", "data", "output")}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        pytest.param(
            ("--recipe", "internvl2-8b-full", "--gpus", "8", "--gpu-memory", "80Gi"),
            0,
            "ZeRO stage 1: Fits: 54.7 GiB of 80.0 GiB a GPU",
            id="fits",
        ),
        pytest.param(
            ("--recipe", "internvl2-8b-full", "--gpu-memory", "24Gi"),
            65,
            "Does not fit: 50.7 GiB of 24.0 GiB",
            id="does not fit",
        ),
        pytest.param(
            ("--recipe", "internvl2-8b-full", "--gpu-memory", "40Gi", "--zero-stage", "3"),
            0,
            "ZeRO stage 3: Fits: 29.8 GiB of 40.0 GiB",
            id="another stage",
        ),
        pytest.param(
            ("--recipe", "internvl2-2b-full", "--micro-batch", "1"),
            0,
            "microBatchSize up to 16 would fit, with the same global batch.",
            id="room for more",
        ),
    ],
)
def test_estimate_of_a_recipe(words: tuple[str, ...], code: int, said: str) -> None:
    found, text = run("estimate", *words)
    assert found == code
    assert said in text
    assert all(f"ZeRO-{stage}" in text for stage in (1, 2, 3))


def test_estimate_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(recipe_config("internvl2-8b-full").to_yaml(), encoding="utf-8")
    by_config, by_recipe = (
        run("estimate", *words) for words in (("--config", str(path)), ("--recipe", "internvl2-8b-full"))
    )
    assert by_config == by_recipe


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        pytest.param(
            ("recipes", "show", "internvl2-2b-lor"),
            65,
            "did you mean 'internvl2-2b-lora'? `internvl-trainer recipes` lists all",
            id="unknown recipe",
        ),
        pytest.param(("estimate", "--recipe", "llama"), 65, "unknown recipe 'llama'", id="unknown recipe to estimate"),
        pytest.param(("estimate", "--config", "/nowhere/run.yaml"), 78, "/nowhere/run.yaml", id="no such file"),
    ],
)
def test_a_mistake_is_named(words: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words)[0] == code
    assert said in capsys.readouterr().err


def test_a_model_outside_the_catalogue_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe_config("internvl2-8b-full")
    config.model.name = None
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert run("estimate", "--config", str(path))[0] == 65
    assert "an estimate needs a name of the catalogue" in capsys.readouterr().err


@pytest.mark.parametrize("amount", ["lots", "0Gi"])
def test_a_wrong_amount_of_memory_is_refused(amount: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("estimate", "--recipe", "internvl2-8b-full", "--gpu-memory", amount)
    assert f"found {amount!r}, expected an amount of memory such as 80Gi or 80GB" in capsys.readouterr().err
