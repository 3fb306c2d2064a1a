"""Every feature of docs/features.md is ours, and names a test that exists."""

from __future__ import annotations

import re

import pytest
from ivft_cluster.paths import CHECKOUT

PAGE = (CHECKOUT / "docs/features.md").read_text(encoding="utf-8")
HEAD = "| feature | ours | cert-manager | external-secrets | Kubeflow Trainer | test |\n|---|---|---|---|---|---|\n"
TABLES = [part.split("\n\n")[0] for part in PAGE.split(HEAD)[1:]]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for table in TABLES for line in table.splitlines()]


def test_every_table_has_the_head() -> None:
    assert len(TABLES) == PAGE.count("| feature |") == PAGE.count("\n## ")


def test_no_feature_stands_twice() -> None:
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in ROWS])
def test_every_feature_is_ours_and_proved_by_a_test(row: list[str]) -> None:
    _, ours, *peers, named = row
    assert len(peers) == 3
    assert set(peers) <= {"yes", "partly", "no", "—"}
    assert ours == "yes"
    file, _, name = named.strip("`").partition("::")
    text = (CHECKOUT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{named} is not there"
