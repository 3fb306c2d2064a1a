"""The picture of import layers: layers follow from imports, cycles are told, and the text is always the same."""

import grimp
import pytest
from tools.import_picture import against_layers, draw, edges_of, layers_of


def graph_of(*imports: str) -> grimp.ImportGraph:
    """A package `app`; each import is written "importer imported", without the package."""
    graph = grimp.ImportGraph()
    graph.add_module("app")
    for line in imports:
        importer, imported = (f"app.{name}" for name in line.split())
        graph.add_import(importer=importer, imported=imported)
    return graph


def test_a_box_is_above_the_boxes_that_it_imports() -> None:
    graph = graph_of("main core.reconcile", "core.reconcile core.plan", "main tools", "tools core.plan")
    assert layers_of(edges_of(graph, "app")) == [["main"], ["tools"], ["core"]]


def test_boxes_without_imports_share_the_lowest_layer() -> None:
    assert layers_of({"b": set(), "a": set(), "c": {"a"}}) == [["c"], ["a", "b"]]


def test_a_cycle_has_no_layers() -> None:
    with pytest.raises(ValueError, match="these import each other: a, b"):
        layers_of({"a": {"b"}, "b": {"a"}, "c": set()})


def test_an_import_that_closes_a_cycle_is_listed_and_removed() -> None:
    graph = graph_of("core.a store.a", "core.b store.b", "store.c core.a")
    assert against_layers(graph, "app") == ["store -> core"]
    assert layers_of(edges_of(graph, "app")) == [["core"], ["store"]]


def test_the_picture_is_the_same_each_time_and_shows_both_applications() -> None:
    drawn = draw()
    assert drawn == draw()
    assert all(f">{name}</text>" in drawn for name in ("internvl_operator", "internvl_trainer", "core", "artifacts"))
