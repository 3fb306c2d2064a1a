"""Files that `make generate` writes: write them, or with `--check` find those that are out of date."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path


def generate(description: str | None, contents: Callable[[Path], Mapping[Path, str]]) -> int:
    """Write the files of the paths on the command line; the exit code: 1 when `--check` finds a stale one, else 0.

    Args:
        contents: the text of each file that a path of the command line stands for.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is out of date")
    parser.add_argument("paths", nargs="+", type=Path)
    arguments = parser.parse_args()
    files = {path: text for given in arguments.paths for path, text in contents(given).items()}
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if arguments.check:
            print(f"{path} is out of date; run `make generate`", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
    return 1 if arguments.check and stale else 0


def with_tables(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The Markdown `text` with each table, by name, that it has markers for."""
    for name, make in tables.items():
        if f"<!-- {name}: generated -->" in text:
            text = with_table(text, name, make())
    return text


def with_table(text: str, name: str, table: str) -> str:
    """The Markdown `text` with `table` between its markers `<!-- NAME: generated -->` and `<!-- end of NAME -->`."""
    begin, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
