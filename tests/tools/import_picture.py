"""Draws the import layers of the three packages as an SVG: every box imports only from boxes below it.

A box is a module or subpackage directly under its package; the contract is one box under both applications. Imports
that close a cycle are left out of the layering and listed below it, so that the picture shows what is still to mend.
"""

import sys
from collections.abc import Iterable, Mapping
from html import escape

import grimp
from internvl_api.generated import generate

CONTRACT = "internvl_api"
APPLICATIONS = ("internvl_operator", "internvl_trainer")

_WIDTH, _MARGIN, _GAP = 980, 20, 20
_CHARACTER, _BOX, _SPACE, _LINE = 7.3, 26, 8, 16  # pixels: 12 px monospace character, box height, gap, line

Edges = Mapping[str, set[str]]  # box -> the boxes that it imports
Layers = list[list[str]]  # highest first


def unit_of(module: str, package: str) -> str:
    """The box of a module: the first name below its package, or "" for the package itself."""
    return module.removeprefix(package).lstrip(".").partition(".")[0]


def edges_of(graph: grimp.ImportGraph, package: str) -> dict[str, set[str]]:
    """Box -> the boxes of the same package that its modules import."""
    edges: dict[str, set[str]] = {unit_of(module, package): set() for module in _modules(graph, package)}
    for module in _modules(graph, package):
        box = unit_of(module, package)
        for imported in graph.find_modules_directly_imported_by(module):
            if imported.startswith(f"{package}.") and unit_of(imported, package) != box:
                edges[box].add(unit_of(imported, package))
    edges.pop("", None)
    return edges


def layers_of(edges: Edges) -> Layers:
    """Boxes by the longest chain of imports below them, the highest first. Raises ValueError for a cycle."""
    left, layers = dict(edges), Layers()
    while left:
        ready = sorted(box for box in left if not edges[box] & left.keys())
        if not ready:
            raise ValueError(f"these import each other: {', '.join(sorted(left))}")
        layers.insert(0, ready)
        left = {box: below for box, below in left.items() if box not in ready}
    return layers


def against_layers(graph: grimp.ImportGraph, package: str) -> list[str]:
    """Remove the imports that close cycles from the graph; those boxes as "from -> to" lines."""
    found = sorted(graph.nominate_cycle_breakers(package))
    for importer, imported in found:
        graph.remove_import(importer=importer, imported=imported)
    pairs = {(unit_of(importer, package), unit_of(imported, package)) for importer, imported in found}
    targets = {one: [other for start, other in sorted(pairs) if start == one] for one, _ in pairs}
    return [f"{one} -> {', '.join(others)}" for one, others in sorted(targets.items())]


def draw() -> str:
    """The whole picture as SVG text."""
    graph = grimp.build_graph(CONTRACT, *APPLICATIONS, cache_dir=None)
    width = (_WIDTH - 2 * _MARGIN - _GAP * (len(APPLICATIONS) - 1)) / len(APPLICATIONS)
    columns, notes = [], []
    for package in APPLICATIONS:
        upward = against_layers(graph, package)
        columns.append(_rows(layers_of(edges_of(graph, package)), width - 2 * _SPACE))
        notes.append(upward)
    height = max(_column_height(rows) for rows in columns)
    top = _MARGIN + _LINE
    parts = []
    for number, (package, rows) in enumerate(zip(APPLICATIONS, columns, strict=True)):
        left = _MARGIN + number * (width + _GAP)
        parts += _frame(left, top, width, height, package)
        y = top + height - _column_height(rows) + _SPACE  # align the lowest layers with the contract
        for row in rows:
            parts += _row(row, left + _SPACE, y, width - 2 * _SPACE)
            y += _row_height(row) + _SPACE
    y = top + height + _GAP + _LINE
    parts += _frame(_MARGIN, y, _WIDTH - 2 * _MARGIN, _BOX, CONTRACT)
    parts.append(_text(_WIDTH / 2, y + 17, "the contract: every box above may import it", anchor="middle"))
    y += _BOX + _GAP + _LINE
    for package, lines in zip(APPLICATIONS, notes, strict=True):
        for line in [f"Imports against the layers in {package}:", *lines] if lines else []:
            parts.append(_text(_MARGIN, y, line))
            y += _LINE
    return _document(parts, y + _MARGIN - _LINE)


def _modules(graph: grimp.ImportGraph, package: str) -> list[str]:
    return sorted(module for module in graph.modules if module == package or module.startswith(f"{package}."))


def _rows(layers: Layers, width: float) -> list[list[list[str]]]:
    """Each layer as the lines of boxes that fit into the width."""
    rows = []
    for layer in layers:
        lines: list[list[str]] = [[]]
        for box in layer:
            if lines[-1] and _line_width([*lines[-1], box]) > width - 2 * _SPACE:
                lines.append([])
            lines[-1].append(box)
        rows.append(lines)
    return rows


def _box_width(name: str) -> float:
    return len(name) * _CHARACTER + 14


def _line_width(line: Iterable[str]) -> float:
    return sum(_box_width(box) + _SPACE for box in line) - _SPACE


def _row_height(lines: list[list[str]]) -> float:
    return len(lines) * (_BOX + _SPACE) + _SPACE


def _column_height(rows: list[list[list[str]]]) -> float:
    return sum(_row_height(row) + _SPACE for row in rows) + _SPACE


def _frame(x: float, y: float, width: float, height: float, title: str) -> list[str]:
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="package"/>',
        _text(x, y - 6, title, css="title"),
    ]


def _row(lines: list[list[str]], x: float, y: float, width: float) -> list[str]:
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{_row_height(lines):g}" rx="4" class="layer"/>']
    for number, line in enumerate(lines):
        left, top = x + (width - _line_width(line)) / 2, y + _SPACE + number * (_BOX + _SPACE)
        for box in line:
            size = _box_width(box)
            parts.append(f'<rect x="{left:g}" y="{top:g}" width="{size:g}" height="{_BOX}" rx="3" class="box"/>')
            parts.append(_text(left + size / 2, top + 17, box, anchor="middle"))
            left += size + _SPACE
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", css: str = "name") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{css}">{escape(text)}</text>'


def _document(parts: list[str], height: float) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" role="img">',
            "<!-- GENERATED by `make generate` from the packages' imports; edits are lost. -->",
            "<title>Import layers: a box imports only from boxes in lower rows</title>",
            "<style>text { font: 12px monospace; fill: #1b1f24 } .title { font-weight: bold }",
            ".package { fill: #f6f8fa; stroke: #57606a } .layer { fill: #ddf4ff } .box { fill: #fff; stroke: #0969da }",
            "</style>",
            f'<rect width="{_WIDTH}" height="{height:g}" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def main() -> int:
    """Write the picture of the import layers; with `--check` fail when it is out of date."""
    return generate(main.__doc__, lambda path: {path: draw()})


if __name__ == "__main__":
    sys.exit(main())
