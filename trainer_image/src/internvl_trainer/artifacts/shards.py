"""Lists the files behind the address of an annotation."""

from __future__ import annotations

from fnmatch import fnmatch

from internvl_trainer.artifacts.sources import list_sizes
from internvl_trainer.artifacts.storage import local_path
from internvl_trainer.errors import UserError

_DEFAULT_SHARDS = ("*.parquet", "*.arrow", "*.tar")


def list_shards(annotation: str, *, field: str) -> list[str]:
    """The files of an annotation: one file, or the matches of a pattern or repository in order of name."""
    is_repository = annotation.startswith("hf://datasets/") and annotation.count("/") == 4
    if not is_repository and "*" not in annotation.rpartition("/")[2]:
        return [annotation]
    folder, _, pattern = (annotation, "", "") if is_repository else annotation.rpartition("/")
    base = folder
    if folder.startswith("hf://datasets/"):
        base = "/".join(folder.split("/")[:5])
        pattern = "/".join([*folder.split("/")[5:], pattern])
    names = _list(base, f"{field}.annotation")
    wanted = [pattern] if pattern else list(_DEFAULT_SHARDS)
    found = sorted(name for name in names if any(fnmatch(name, each) for each in wanted))
    if not found:
        raise UserError("AnnotationMissing", f"found no file {' or '.join(wanted)} in {base}", annotation)
    if is_repository:
        found = _training_split(found, annotation)
    return [f"{base}/{name}" for name in found]


def _list(base: str, field: str) -> list[str]:
    if "://" in base and not base.startswith("pvc://"):
        return list(list_sizes(base, field=field))
    folder = local_path(base or "/", field=field)
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _training_split(names: list[str], annotation: str) -> list[str]:
    """The shards of the split train. Raises UserError where the repository has several sets of them."""
    train = [name for name in names if "train" in name.rpartition("/")[2]] or names
    if folders := sorted({name.rpartition("/")[0] for name in train})[1:]:
        message = f"the repository has several sets of files; name one, such as {annotation}/{folders[0]}/*"
        raise UserError("AnnotationAmbiguous", message, annotation)
    return train
