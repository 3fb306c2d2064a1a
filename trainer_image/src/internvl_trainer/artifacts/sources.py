"""What a run reads: checkpoints, annotation files and media, wherever they are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from internvl_trainer.artifacts.cache import Cache, digest_of, open_cache
from internvl_trainer.artifacts.storage import (
    AccessDenied,
    Storage,
    StoredFile,
    Unavailable,
    inside,
    local_path,
    open_storage,
)
from internvl_trainer.errors import UserError

_HUB = re.compile(r"^hf://(?P<repository>[^/]+/[^/@]+)(?:@(?P<revision>.+))?$")
_PARALLEL_FILES = 8
Result = TypeVar("Result")

# Pickles may hold code and are never read; the rest only costs time. Weights in safetensors are what remains.
UNUSED_IN_CHECKPOINTS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf")


def list_directory(uri: str, *, field: str) -> list[str]:
    """Names of the files under a checkpoint URI, relative, without downloading any."""
    if uri.startswith("hf://"):
        return [name for name in _hub(uri, field, _hub_names) if not is_unused(name)]
    storage = open_storage(uri, field=field)
    return [file.key for file in _present(storage, storage.list(), field) if not is_unused(file.key)]


def fetch_directory(uri: str, *, field: str, weights: bool = True) -> Path:
    """A local folder with the files of a checkpoint URI; plain paths and PVCs are used where they are.

    `weights=False` leaves the safetensors out, which is all that preflight needs.
    """
    if uri.startswith("hf://"):
        return _hub(uri, field, lambda repository, revision: _hub_snapshot(repository, revision, weights))
    if not uri.startswith("s3://"):
        return _present_folder(local_path(uri, field=field), uri, field)
    storage = open_storage(uri, field=field)
    wanted = [file for file in storage.list() if not is_unused(file.key) and (weights or not _is_weights(file.key))]
    files = _present(storage, wanted, field)
    name = "\n".join([uri, *(f"{file.key} {file.etag}" for file in files)])
    return _cache().folder(name, lambda folder: _download(storage, files, folder))


def fetch_file(uri: str, *, field: str) -> Path:
    """A local path of one file (an annotation or a meta JSON)."""
    if uri.startswith("hf://"):
        raise UserError("UnsupportedSource", f"found {uri!r}: give this file as s3://, pvc:// or a path", field)
    if not uri.startswith("s3://"):
        path = local_path(uri, field=field)
        if not path.is_file():
            raise UserError("NotFound", f"found no file {path}; check the path", field)
        return path
    folder, _, key = uri.rpartition("/")
    storage = open_storage(folder, field=field)
    found = storage.stat(key)
    if found is None:
        raise UserError("NotFound", f"found no object {uri}; check the URI", field)
    return _cache().file(f"{uri}\n{found.etag}", lambda path: storage.download(key, path))


def open_media(root: str, relative: str) -> bytes:
    """The bytes of a picture or video `relative` to `root`. Raises FileNotFoundError where there is none.

    Media are taken to be immutable: a cached one is not asked for again.
    """
    field, root = "data.root", root.rstrip("/")
    name = inside(relative, field=field)
    try:
        if root.startswith("s3://"):
            return _cache().bytes_of(f"{root}\n{name}", lambda: _storage(root, field).read(name))
        return _read_inside(local_path(root, field=field), name)
    except UserError as error:
        if error.reason == "NotFound":
            raise FileNotFoundError(f"{root}/{name}") from error
        raise


def parent_uri(uri: str) -> str:
    """The folder of a file's URI: where relative media paths start unless a root is given."""
    return uri.rpartition("/")[0]


def _read_inside(root: Path, name: str) -> bytes:
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise UserError("PathOutsideRoot", f"found {name!r}, a link that leaves {root}", "data.root")
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise AccessDenied("AccessDenied", f"{path}: {error.strerror}", "data.root") from error


def _download(storage: Storage, files: Iterable[StoredFile], folder: Path) -> None:
    def download(file: StoredFile) -> None:
        path = folder / inside(file.key, field=storage.uri)
        if path.exists():  # an earlier attempt brought it
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        arriving = path.with_name(f".arriving-{digest_of(path.name)}")
        storage.download(file.key, arriving)
        if arriving.stat().st_size != file.size:
            raise Unavailable("DownloadIncomplete", f"{storage.uri}/{file.key} changed while it was read; try again")
        os.replace(arriving, path)

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(download, files))


def _present(storage: Storage, files: Iterable[StoredFile], field: str) -> list[StoredFile]:
    found = list(files)
    if not found:
        raise UserError("NotFound", f"found no file under {storage.uri}; check the URI", field)
    return found


def _present_folder(path: Path, uri: str, field: str) -> Path:
    if not path.is_dir():
        raise UserError("NotFound", f"found no folder {uri}; check the path", field)
    return path


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def is_unused(name: str) -> bool:
    """Whether a file of a checkpoint is never read: weights in a format other than safetensors."""
    return Path(name).suffix in {pattern[1:] for pattern in UNUSED_IN_CHECKPOINTS}


def _hub(uri: str, field: str, ask: Callable[[str, str | None], Result]) -> Result:
    """Ask the Hub; its errors in the user's words."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match = _HUB.match(uri)
    if match is None:
        raise UserError("UnsupportedSource", f"found {uri!r}, expected hf://owner/repository@revision", field)
    try:
        return ask(match["repository"], match["revision"])
    except RevisionNotFoundError as error:
        raise UserError("NotFound", f"{uri}: no revision {match['revision']!r} in that repository", field) from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise AccessDenied(
            "AccessDenied",
            f"{uri}: not found, or not open to this token; check the name, accept the model's terms on the Hub, and "
            "put a token into the Secret spec.secrets.huggingFace (key HF_TOKEN)",
            field,
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Unavailable("HubUnavailable", f"{uri}: {type(error).__name__}: the Hub did not answer", field) from error


def _hub_names(repository: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    return HfApi().list_repo_files(repository, revision=revision)


def _hub_snapshot(repository: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    left_out = [*UNUSED_IN_CHECKPOINTS, *([] if weights else ["*.safetensors"])]
    cache = _cache().root / "hub"
    return Path(snapshot_download(repository, revision=revision, cache_dir=cache, ignore_patterns=left_out))


@lru_cache(maxsize=64)
def _storage(uri: str, field: str) -> Storage:
    return open_storage(uri, field=field)


@lru_cache(maxsize=1)
def _cache() -> Cache:
    return open_cache()
