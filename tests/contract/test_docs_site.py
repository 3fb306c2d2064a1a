"""`make docs`: the site builds without a warning, and links out of docs/ lead to the repository."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ivft_cluster.paths import CHECKOUT
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

FORGE = "https://forge.example/team/operator"
LINKS = re.compile(r'<(?:script|link|img)\b[^>]*?\b(?:src|href)="(https?:[^"]+)"')


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("REPO_URL", FORGE)
    yield
    logging.getLogger("mkdocs").handlers.clear()


def built(docs: Path, site: Path, **other: object) -> None:
    build(load_config(str(CHECKOUT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(site), strict=True, **other))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPO_URL", FORGE)
        built(CHECKOUT / "docs", folder)
    return folder


def test_links_out_of_docs_lead_to_the_repository(site: Path) -> None:
    guide = (site / "guides/custom-dataset/index.html").read_text("utf-8")
    assert f'href="{FORGE}/blob/main/examples/custom-dataset-lora.yaml"' in guide
    assert f'href="{FORGE}/tree/main/examples/gitops"' in (site / "gitops/index.html").read_text("utf-8")


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    assert {link for page in site.rglob("*.html") for link in LINKS.findall(page.read_text("utf-8"))} == set()


def test_search_finds_reasons_and_the_persona_pages(site: Path) -> None:
    index = (site / "search/search_index.json").read_text("utf-8")
    assert "BadRow" in index
    assert "start/slurm-engineer/" in index


def test_links_to_nowhere_and_forgotten_pages_are_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    links = ["other.md", "index.md#nowhere", "../no-such-file.yaml", "/absolute.md"]
    (docs / "index.md").write_text("# Home\n\n" + "".join(f"[a link]({link})\n" for link in links), encoding="utf-8")
    (docs / "forgotten.md").write_text("# Forgotten\n", encoding="utf-8")
    with pytest.raises(Abort, match="5 warnings"):
        built(docs, tmp_path / "site", nav=[{"Home": "index.md"}])
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    for name in (*links, "forgotten.md"):
        assert any(name.removeprefix("index.md") in warning for warning in warnings), name
