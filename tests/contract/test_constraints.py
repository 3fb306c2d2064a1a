"""constraints.txt pins what the packages ask for, so that a virtualenv and an image made next year are today's."""

from __future__ import annotations

import tomllib
from importlib import metadata

import pytest
from ivft_cluster.paths import CHECKOUT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OUR_OWN = {"internvl-api", "internvl-operator", "internvl-trainer"}


def pins() -> dict[str, str]:
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def asked_for() -> list[Requirement]:
    """Every requirement of the three packages, their extras and the contributors' group."""
    found: list[str] = []
    for folder in ("crds", "operator", "trainer_image", "."):
        document = tomllib.loads((CHECKOUT / folder / "pyproject.toml").read_text(encoding="utf-8"))
        project = document["project"]
        for group in (
            project.get("dependencies", []),
            document["build-system"]["requires"],
            *project.get("optional-dependencies", {}).values(),
            *document.get("dependency-groups", {}).values(),
        ):
            found += group
    requirements = [Requirement(line) for line in sorted(set(found))]
    return [each for each in requirements if each.name not in OUR_OWN]


@pytest.mark.parametrize("requirement", [pytest.param(each, id=str(each)) for each in asked_for()])
def test_requirement_has_a_pin_that_satisfies_it(requirement: Requirement) -> None:
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{requirement.name} is not in constraints.txt"
    assert pinned in requirement.specifier


def test_installed_packages_have_the_pinned_versions() -> None:
    installed = {canonicalize_name(each.name): each.version.partition("+")[0] for each in metadata.distributions()}
    differing = {name: (installed[name], pin) for name, pin in pins().items() if installed.get(name, pin) != pin}
    assert differing == {}
