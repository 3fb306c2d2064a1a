"""`kubectl ivft mirror`: everything that a cluster without the Internet needs, by address. It asks no server."""

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from textwrap import wrap
from typing import Literal, NamedTuple, get_args

from internvl_api.models.catalogue import find_model
from internvl_api.models.kinds import RETRIEVAL_MODELS
from internvl_api.recipes.datasets import datasets_of
from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.summary import recipe_config
from internvl_api.validation.violations import SpecError

from internvl_operator.kubectl_ivft.client import UserError

Kind = Literal["image", "base image", "release file", "lock file", "model", "data"]
Variant = Literal["cu13", "cu12"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_BELOW = " " * 6
_SHOWN = 3  # recipes named for a model; the JSON names all

_OPERATOR_BASE = "docker.io/library/python:3.11-slim-bookworm"
_TRAINER_BASES: dict[Variant, str] = {
    "cu13": "docker.io/library/python:3.11-slim-bookworm"
    "@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b",
    "cu12": "docker.io/pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime"
    "@sha256:6acf597eeb8e376a96580dde4952f37cc017fef732bb40bfc73f28f25e3f64b4",
}
_HEADINGS: dict[Kind, str] = {
    "image": "IMAGES: copy them to your registry, and set global.imageRegistry",
    "base image": "BASE IMAGES: only to build the images inside",
    "release file": "RELEASE FILES: `make release` writes them to dist/",
    "lock file": "LOCK FILES: the packages of the images, by version and hash; only to build inside",
    "model": "MODELS: copy each folder to your store, and name it in model.source",
    "data": "DATA: copy it to your store, and name it in data and evaluation",
}


class Entry(NamedTuple):
    """One thing to bring inside. `size` in bytes where it is known; `recipes` that need it, none if all do."""

    kind: Kind
    address: str
    use: str
    size: int | None = None
    recipes: tuple[str, ...] = ()


def entries(recipes: Sequence[str], variant: Variant = "cu13", registry: str = "") -> list[Entry]:
    """What the named recipes need; without names, what all of them need.

    Raises UserError, with a hint, for an unknown recipe.
    """
    for name in recipes:
        try:
            recipe_config(name)
        except SpecError as error:
            raise UserError(error.message) from error
    chosen = [name for name in recipe_names() if name in recipes or not recipes]
    return [*_images(variant, registry), *_files(variant), *_models(chosen), *_data(chosen)]


def text(found: Sequence[Entry], width: int) -> str:
    """The list for reading: an address is never broken; its use stands beside it, or below where that is too wide."""
    several = len({name for entry in found for name in entry.recipes}) > 1
    lines: list[str] = []
    heading = None
    for entry in found:
        if entry.kind != heading:
            heading = entry.kind
            lines += [*([""] if lines else []), *wrap(_HEADINGS[heading], width)]
        use = _use(entry, several)
        if use and len(f"  {entry.address}  {use}") <= width:
            lines.append(f"  {entry.address}  {use}")
        else:
            lines += [f"  {entry.address}", *wrap(use, width, initial_indent=_BELOW, subsequent_indent=_BELOW)]
    return "\n".join(lines)


def as_json(found: Iterable[Entry]) -> str:
    """The list for programs."""
    return json.dumps([entry._asdict() for entry in found], indent=2)


def _use(entry: Entry, several: bool) -> str:
    """What an entry is for, with its size, and the first recipes where the list is for several."""
    size = f"{entry.size / 1e9:.1f} GB" if entry.size else ""
    names = ", ".join(entry.recipes[:_SHOWN]) if several else ""
    more = f" and {len(entry.recipes) - _SHOWN} more" if names and len(entry.recipes) > _SHOWN else ""
    return "; ".join(part for part in (entry.use, size, names + more) if part)


def _images(variant: Variant, registry: str) -> list[Entry]:
    release = version("internvl-operator")
    prefix = f"{registry.rstrip('/')}/" if registry else ""
    return [
        Entry("image", f"{prefix}internvl-operator:{release}", "the operator"),
        Entry("image", f"{prefix}internvl-trainer:{release}-{variant}", "every stage of a run"),
        Entry("base image", _OPERATOR_BASE, "the operator's"),
        Entry("base image", _TRAINER_BASES[variant], "the trainer's"),
    ]


def _files(variant: Variant) -> list[Entry]:
    release = version("internvl-operator")
    wheels = [f"internvl_{name}-{release}-py3-none-any.whl" for name in ("api", "operator", "trainer")]
    locked = ["requirements.txt", "requirements-source.txt"] + (["requirements-torch.txt"] if variant == "cu13" else [])
    return [
        Entry("release file", f"internvl-operator-{release}.tgz", "the chart"),
        Entry("release file", "kustomize.tar.gz", "the same for kustomize"),
        Entry("release file", "kubectl-ivft-linux-amd64.tar.gz", "this plugin"),
        *(Entry("release file", name, "for a machine without a cluster") for name in wheels),
        Entry("release file", "SHA256SUMS", "their digests"),
        Entry("lock file", "constraints.txt", "the operator's image"),
        *(Entry("lock file", f"trainer_image/{name}", "the trainer's image") for name in locked),
    ]


def _models(recipes: Sequence[str]) -> list[Entry]:
    users: dict[str, list[str]] = {}
    for name in recipes:
        users.setdefault(recipe_config(name).model.name or "", []).append(name)
    return [
        Entry("model", f"hf://OpenGVLab/{model}", "", _weights(model), tuple(names))
        for model, names in sorted(users.items())
    ]


def _weights(model: str) -> int | None:
    """Bytes of a chat model's weights, two for each parameter."""
    found = None if model in RETRIEVAL_MODELS else find_model(model)
    return 2 * found.parameters if found else None


def _data(recipes: Sequence[str]) -> list[Entry]:
    """Each address once, with every data set and recipe that has it."""
    uses: dict[str, dict[str, None]] = {}
    users: dict[str, dict[str, None]] = {}
    for name in recipes:
        for dataset in datasets_of(name):
            for address in dataset.addresses:
                note = " (pictures, by a form)" if address == dataset.form else ""
                uses.setdefault(address, {})[f"{dataset.name}{note}"] = None
                users.setdefault(address, {})[name] = None
    return [Entry("data", address, ", ".join(uses[address]), None, tuple(users[address])) for address in uses]
