"""The documentation agrees with the code: links lead somewhere, snippets parse, tables say what the models say."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from internvl_api import publish_condition, spec
from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.spec import evaluation
from internvl_api.types import ApiModel
from internvl_operator.kubectl_ivft.__main__ import main as kubectl_ivft
from internvl_trainer.cli.main import parse
from ivft_cluster.paths import CHECKOUT

GUIDES = sorted((CHECKOUT / "docs/guides").glob("*.md"))
PAGES = [*sorted(CHECKOUT.glob("*.md")), *sorted((CHECKOUT / "docs").rglob("*.md"))]
DECISIONS = sorted((CHECKOUT / "docs/decisions").glob("0*.md"))
REFERENCE = (CHECKOUT / "docs/evaluation.md").read_text(encoding="utf-8")
DATA = {"train": {"pets": {"annotation": "s3://data/pets.jsonl"}}}


def of_each(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=str(path.relative_to(CHECKOUT))) for path in paths]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the rows of the table whose header starts with `first`."""
    table = text.split(f"\n| {first} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("page", of_each(PAGES))
def test_links_have_existing_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", of_each(DECISIONS))
def test_a_decision_has_its_parts_and_is_listed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^#+ (.+)$", text, re.MULTILINE)[1:] == ["Context", "Decision", "Consequences"]
    title = text.split("\n", 1)[0].removeprefix("# ")
    assert f"[{title}]({page.name})" in (page.parent / "index.md").read_text(encoding="utf-8")


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_and_make_targets_in_a_page_exist(name: str) -> None:
    text = (CHECKOUT / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:crds|operator|trainer_image|tests|docs|charts|examples)/[\w./-]+)`", text)
    assert [path for path in named if not (CHECKOUT / path).exists()] == []
    targets = re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= set(targets)


@pytest.mark.parametrize("page", of_each([*GUIDES, CHECKOUT / "docs/evaluation.md"]))
def test_snippets_parse(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
    for text in blocks(page, "yaml"):
        yaml.safe_load(text)
    for line in "".join(blocks(page, "json")).splitlines():
        json.loads(line)


def plugin_commands(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The commands of `kubectl ivft`."""
    with pytest.raises(SystemExit):
        kubectl_ivft(["--help"])
    return set(re.findall(r"^ {4}([a-z]+) ", capsys.readouterr().out, re.MULTILINE))


@pytest.mark.parametrize("page", of_each([*PAGES, CHECKOUT / "charts/internvl-operator/files/alerts.yaml"]))
def test_commands_named_in_a_sentence_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"`kubectl ivft ([a-z]+)", page.read_text(encoding="utf-8")))
    assert named <= plugin_commands(capsys)


@pytest.mark.parametrize("page", of_each(PAGES))
def test_commands_in_a_page_are_understood(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = plugin_commands(capsys)
    for line in "".join(blocks(page, "")).replace("\\\n", " ").splitlines():
        for program, rest in re.findall(r"^(?:\$ )?(internvl-trainer|kubectl ivft) (.*)", line.strip()):
            words = shlex.split(re.split(r" #|  | [>|&]", rest)[0])
            if program == "kubectl ivft":
                assert words[0] in plugin | {"--help"}, line
            elif "--help" not in words:
                parse(words)


@pytest.mark.parametrize("page", of_each(GUIDES))
def test_recipes_and_examples_in_a_guide_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:mini-)?internvl[a-z0-9-]+-(?:full|head|lora)(?:-[a-z]+)*\b", text)
    assert set(named) <= set(recipe_names())
    for name in re.findall(r"\bexamples/([a-z0-9/-]+(?:\.yaml)?)", text):
        assert (CHECKOUT / "examples" / name).exists(), name


@pytest.mark.parametrize("page", of_each([page for page in GUIDES if "LoRA: recipe" in page.read_text("utf-8")]))
def test_a_table_of_sizes_has_the_recipes_figures(page: Path) -> None:
    table = rows(page.read_text(encoding="utf-8"), "model, download")
    assert table
    for model, *cells, _ in table:
        for recipe, gpus, stage, batch in (cells[:4], cells[4:]):
            config = resolve(
                parse_spec({"recipe": recipe.strip("`"), "data": DATA, "output": "s3://models/out"}),
                job="a/b",
                job_uid="u",
            )
            assert config.model.name == model.split(",")[0]
            assert gpus == f"{config.workers} x {config.processes_per_worker}"
            assert (int(stage), int(batch)) == (config.training.zero_stage, config.training.micro_batch_size)
            assert config.training.global_batch_size == (128 if config.method == "full" else 16)


@pytest.mark.parametrize(
    ("guide", "first"),
    [("evaluation-alone", "zero-shot"), ("retrieval", "after full fine-tuning")],
)
def test_the_average_of_published_figures_is_that_of_their_row(guide: str, first: str) -> None:
    for _, pictures, texts, average in rows((CHECKOUT / f"docs/guides/{guide}.md").read_text("utf-8"), first):
        figures = [float(figure) for cell in (pictures, texts) for figure in cell.split(", ")]
        assert len(figures) == 6
        assert float(average) == pytest.approx(sum(figures) / 6, abs=0.051)


def test_the_reference_has_every_task_with_its_figures() -> None:
    found = {}
    for names, measures, prompt, tokens in rows(REFERENCE, "`task` | measures"):
        for name in re.findall(r"`([\w-]+)`", names):
            metrics = tuple(word for word in re.findall(r"`(\w+)`", measures))
            asked = match[1] if (match := re.fullmatch(r"`(.+)`", prompt)) else None
            found[name] = (metrics, asked, *map(int, tokens.split(", ")))
    assert found == {
        kind: (task.metrics, task.prompt, task.min_new_tokens, task.max_new_tokens)
        for kind, task in evaluation.TASK_DEFAULTS.items()
    }


def test_the_reference_has_every_figure_of_answers() -> None:
    named = [cells[0].strip("`") for cells in rows(REFERENCE, "figure")]
    assert named == list(publish_condition.ANSWER_METRICS)


@pytest.mark.parametrize(
    ("section", "model"),
    [
        pytest.param("evaluation\n", evaluation.Evaluation, id="evaluation"),
        pytest.param("evaluation\n\n| field | default | meaning |", evaluation.EvaluationTask, id="a task"),
        pytest.param("publish.hub\n", spec.Hub, id="publish.hub"),
    ],
)
def test_the_reference_has_every_field(section: str, model: type[ApiModel]) -> None:
    table = rows(REFERENCE.split(f"## {section}", 1)[1], "field")
    named = [name for cells in table for name in re.findall(r"`(\w+)`", cells[0])]
    assert sorted(named) == sorted(str(field.alias) for field in model.model_fields.values())


def test_the_reference_has_the_grammar_of_conditions() -> None:
    (grammar,) = re.findall(r"^```\n(condition .*?)```", REFERENCE, re.DOTALL | re.MULTILINE)
    assert (
        "".join(line.strip() + "\n" for line in str(publish_condition.__doc__).split("\n\n")[1].splitlines()) == grammar
    )
    examples = [cells[0].strip("`") for cells in rows(REFERENCE, "example")]
    assert len(examples) == 5
    assert all(publish_condition.operands(example) for example in examples)


def test_the_first_spec_of_the_reference_is_valid() -> None:
    (text,) = blocks(CHECKOUT / "docs/evaluation.md", "yaml")
    base = {"recipe": "internvl2-2b-lora-coco", "data": DATA, "output": "s3://models/out"}
    assert resolve(parse_spec(base | yaml.safe_load(text)), job="a/b", job_uid="u").evaluation.baseline
