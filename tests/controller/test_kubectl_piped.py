"""What `kubectl ivft` writes into a file or a pipe."""

import argparse
from typing import cast

import pytest
from internvl_operator.kubectl_ivft.__main__ import run_command
from internvl_operator.kubectl_ivft.client import Runs
from rich.console import Console
from rich.table import Table

WORDS = "Unschedulable: " + "no node has room, " * 20


def show(_: Runs, __: argparse.Namespace, console: Console) -> None:
    """A line of text, and a table that fills the width."""
    console.print(WORDS)
    table = Table.grid(expand=True)
    table.add_row("left")
    console.print(table)


@pytest.mark.parametrize(("command", "is_folded"), [("status", True), ("why", False), ("list", False)])
def test_lines_are_not_padded_and_only_status_is_folded(
    command: str, is_folded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(cast(Runs, None), argparse.Namespace(act=show, command=command))
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert lines[-1] == "left"
    assert (len(lines) > 2) == is_folded
    if is_folded:
        assert max(map(len, lines)) <= 120
    else:
        assert lines[0] == WORDS.rstrip()
