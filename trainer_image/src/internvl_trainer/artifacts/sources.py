"""The inputs of a run: checkpoints, annotation files and media from object stores, hf://, https://, PVCs and paths."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from internvl_api.address import OBJECT_STORES, Address, reveal

from internvl_trainer.artifacts import hub
from internvl_trainer.artifacts.archives import Archive, archives_in, decompress, is_packed_tar, open_archive
from internvl_trainer.artifacts.cache import Cache, open_cache
from internvl_trainer.artifacts.checkpoint_files import is_code, is_unused, is_weights
from internvl_trainer.artifacts.directory_download import download_files, has_small_files_of, require_files
from internvl_trainer.artifacts.download_progress import announced
from internvl_trainer.artifacts.https import HttpsSource
from internvl_trainer.artifacts.links import files_below
from internvl_trainer.artifacts.media_listing import (
    MOST_IN_FOLDER,
    MediaFolder,
    MediaMissing,
    NearestPaths,
    files_of_folder,
    paths_below,
    read_below,
)
from internvl_trainer.artifacts.storage import Storage, StoredFile, inside, local_path, open_storage, sha256_of
from internvl_trainer.errors import AccessDenied, UserError

_PARALLEL_FILES = 8
_LONGEST_KEY = 1024  # bytes of a key of an object store
_REMOTE = (*OBJECT_STORES, "https://")
_LISTING_LOCK = threading.Lock()  # one thread lists a root, the others wait for its result


def list_sizes(uri: str, *, field: str) -> dict[str, int]:
    """Name and size in bytes of each file under a checkpoint URI, without downloading any."""
    uri = Address(uri)
    if uri.startswith("hf://"):
        repo = hub.repository(uri, field=field)
        sizes = {file.path: file.size for file in hub.list_files(repo, hub.commit_of(repo))}
    else:
        storage = _open(uri, field)
        sizes = {file.key: file.size for file in require_files(storage, storage.list(), field)}
    return {name: size for name, size in sizes.items() if not is_unused(name)}


def read_start(uri: str, name: str, length: int, *, field: str) -> bytes:
    """The first `length` bytes of a file under a checkpoint URI, fewer of a shorter one."""
    uri = Address(uri)
    if uri.startswith("hf://"):
        repo = hub.repository(uri, field=field)
        return hub.read_start(repo, _commit(repo), name, length)
    return _open(uri, field).read_start(name, length)


def describe_directory(uri: str, wanted: Callable[[str], bool], *, field: str) -> dict[str, str]:
    """The wanted files of a checkpoint URI: relative name to a text that changes with the content.

    The text is a digest for local files and on the Hub, else ETag and size; remote contents are not read. A commit of
    the Hub never changes and costs no request: {"commit": its hash}.
    """
    uri = Address(uri)
    if uri.startswith("hf://"):
        repo = hub.repository(uri, field=field)
        commit = hub.commit_of(repo)
        if commit == repo.revision:
            return {"commit": commit}
        return {file.path: hub.digest_of(file) for file in hub.list_files(repo, commit) if wanted(file.path)}
    if uri.startswith(_REMOTE):
        storage = _open(uri, field)
        files = require_files(storage, storage.list(), field)
        return {file.key: f"{file.etag} {file.size}" for file in files if wanted(file.key)}
    folder = _present_folder(local_path(uri, field=field), uri, field)
    names = [path.relative_to(folder).as_posix() for path in files_below(folder)]
    names = [name for name in names if wanted(name)]
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True))


def describe_file(uri: str, digest: Callable[[Path], str], *, field: str) -> str:
    """A text that changes with one file's content: `digest` of a local file, else the server's own; see above.

    Raises:
        UserError: there is no such file.
    """
    if uri.startswith("hf://"):
        repo, path = hub.split_file(uri, field=field)
        commit = hub.commit_of(repo)
        file = None if commit == repo.revision else hub.find_file(repo, commit, path)
        return f"commit {commit}" if file is None else hub.digest_of(file)
    if not uri.startswith(_REMOTE):
        path_here = local_path(uri, field=field)
        if not path_here.is_file():
            raise UserError("NotFound", f"found no file {path_here}; check the path", field)
        return digest(path_here)
    storage, key = _object(uri, field)
    found = storage.stat(key)
    if found is None:
        raise UserError("NotFound", f"found no object {uri.partition('?')[0]}; check the URI", field)
    return f"{found.etag} {found.size}"


def describe_root(root: str) -> str:
    """A text that changes when the media below a root change, as far as one request can tell; constant for a folder.

    Raises:
        UserError: there is no such archive or repository.
    """
    field = "data.root"
    if place := _place_in_archive(Address(root)):
        return describe_file(place[0], lambda path: f"{path.stat().st_size} {path.stat().st_mtime_ns}", field=field)
    if root.startswith("hf://"):
        repo, _ = hub.split_file(f"{root.rstrip('/')}/-", field=field)
        return f"commit {_commit(repo)}"
    return "a folder"


def fetch_directory(uri: str, *, field: str, weights: bool = True) -> Path:
    """A local folder with the files of a checkpoint URI; plain paths and PVCs are used where they are.

    `weights=False` leaves the safetensors out, which is all that preflight needs. Of a Hub repository, *.py come only
    from a pinned commit: the trainer never runs them, but whoever loads the published model does.
    """
    uri = Address(uri)
    if uri.startswith("hf://"):
        return _fetch_repository(hub.repository(uri, field=field), weights)
    if not uri.startswith(_REMOTE):
        folder = _present_folder(local_path(uri, field=field), uri, field)
        for _ in files_below(folder):  # refuses links that lead out of it
            pass
        return folder
    storage = _open(uri, field)
    files = _checkpoint_files(storage, field, weights)

    def telling(folder: Path) -> AbstractContextManager[None]:
        return announced(storage.uri, folder, sum(file.size for file in files))

    def make(folder: Path) -> None:
        with telling(folder):
            download_files(storage, files, folder)

    def is_intact(folder: Path) -> bool:
        return has_small_files_of(storage, files, folder)

    return _cache().folder(_copy_name(uri, files), make, is_intact, while_another_makes=telling)


def has_directory(uri: str, *, field: str) -> bool:
    """Whether the cache has all files of a checkpoint URI as they are now; False for a folder that is read in place."""
    uri = Address(uri)
    if uri.startswith("hf://"):
        repo = hub.repository(uri, field=field)
        return _cache().has(_repository_name(repo, hub.commit_of(repo), weights=True))
    if not uri.startswith(_REMOTE):
        return False
    return _cache().has(_copy_name(uri, _checkpoint_files(_open(uri, field), field, weights=True)))


def _checkpoint_files(storage: Storage | HttpsSource, field: str, weights: bool) -> list[StoredFile]:
    wanted = [file for file in storage.list() if not is_unused(file.key) and (weights or not is_weights(file.key))]
    return require_files(storage, wanted, field)


def _copy_name(uri: Address, files: Iterable[StoredFile]) -> str:
    """The name of a checkpoint's copy in the cache."""
    return "\n".join([reveal(uri), *(f"{file.key} {file.etag}" for file in files)])


def fetch_file(uri: str, *, field: str) -> Path:
    """A local path of one file: an annotation, a meta JSON or an archive."""
    uri = Address(uri)
    if uri.startswith("hf://"):
        return _fetch_from_hub(uri, field)
    if not uri.startswith(_REMOTE):
        path = local_path(uri, field=field)
        if not path.is_file():
            raise UserError("NotFound", f"found no file {path}; check the path", field)
        return path
    storage, key = _object(uri, field)
    found = storage.stat(key)
    if found is None:
        raise UserError("NotFound", f"found no object {uri.partition('?')[0]}; check the URI", field)

    def make(path: Path) -> None:
        with announced(uri.partition("?")[0], path.parent, found.size):
            storage.download(key, path)

    return _cache().file(f"{reveal(uri)}\n{found.etag}\n{found.size}", make)


def derived_file(path: Path, purpose: str, make: Callable[[Path], object]) -> Path:
    """The file that `make` writes from the content of `path`, made once and kept in the cache."""
    found = path.stat()
    return _cache().file(f"{purpose}\n{path}\n{found.st_size} {found.st_mtime_ns}", make)


def _object(uri: str, field: str) -> tuple[Storage | HttpsSource, str]:
    """A remote file as its storage and the key in it."""
    folder, _, key = uri.rpartition("/")
    return (HttpsSource(uri, field=field), "") if uri.startswith("https://") else (_open(folder, field), key)


def open_media(root: str, relative: str) -> bytes:
    """The bytes of a picture or video `relative` to `root`: a folder, an archive, or a folder in an archive.

    Media are immutable: a cached file costs no request. Raises MediaMissing (a FileNotFoundError) where there is none,
    MediaFolder (an IsADirectoryError) for a folder, and BadFile for a file that must not be read.
    """
    field, root = "data.root", Address(root)
    name = inside(relative, field=field)
    try:
        if place := _place_in_archive(root):
            archive, folder = place
            return _archive(archive, os.getpid()).read(f"{folder}{name}")
        if root.startswith("hf://"):
            return _fetch_from_hub(f"{root.rstrip('/')}/{name}", field).read_bytes()
        if root.startswith(_REMOTE):
            root = root if root.startswith("https://") else Address(reveal(root).rstrip("/"))
            if len(name.encode()) > _LONGEST_KEY:
                raise MediaMissing(name)
            return _cache().bytes_of(f"{reveal(root)}\n{name}", lambda: _open(root, field).read(name))
        return read_below(local_path(root, field=field), name)
    except FileNotFoundError as error:
        raise _explain_missing(root, name) from error
    except UserError as error:
        if error.reason == "NotFound":
            raise _explain_missing(root, name) from error
        raise


def _explain_missing(root: Address, name: str) -> OSError:
    """MediaFolder when the path is a folder, else MediaMissing with the nearest path."""
    try:
        files = _files_of(root, name) if len(name) <= _LONGEST_KEY else None
    except AccessDenied:  # a file may be read where its folder must not be listed
        files = None
    if files is not None:
        return MediaFolder(name, files)
    with _LISTING_LOCK:
        nearest = _nearest_paths(root, os.getpid())
    return MediaMissing(name, nearest.hint(name))


def _files_of(root: Address, name: str) -> list[str] | None:
    """Paths of the files of a folder below the root; None when it is no folder."""
    if place := _place_in_archive(root):
        archive, folder = place
        files = _archive_folders(archive, os.getpid()).get(f"{folder}{name}")
        return None if files is None else [path.removeprefix(folder) for path in files]
    if root.startswith("https://"):
        return None
    if root.startswith("hf://"):
        return [path for path in _hub_paths(root) if path.rpartition("/")[0] == name] or None
    if root.startswith(OBJECT_STORES):
        storage = open_storage(reveal(root).rstrip("/"), field="data.root")
        keys = (file.key for file in islice(storage.list(f"{name}/"), MOST_IN_FOLDER + 1))
        return [key for key in keys if key.rpartition("/")[0] == name] or None
    return files_of_folder(local_path(root, field="data.root"), name)


@lru_cache(maxsize=16)
def _nearest_paths(root: Address, _process: int) -> NearestPaths:
    return NearestPaths(root.partition("?")[0], _paths_below(root))


def _paths_below(root: Address) -> Iterator[str]:
    """Paths of the files below a root, as far as they can be listed."""
    try:
        if place := _place_in_archive(root):
            archive, folder = place
            names = _archive(archive, os.getpid()).names()
            yield from (name.removeprefix(folder) for name in names if name.startswith(folder))
        elif root.startswith("hf://"):
            yield from _hub_paths(root)
        elif root.startswith(OBJECT_STORES):
            yield from (file.key for file in open_storage(reveal(root).rstrip("/"), field="data.root").list())
        elif not root.startswith("https://"):
            yield from paths_below(local_path(root, field="data.root"))
    except UserError:  # without permission to list there is no hint
        return


@lru_cache(maxsize=16)
def _hub_paths(root: Address) -> tuple[str, ...]:
    """Paths of the files below a folder of a repository, listed once in each process."""
    repo, place = hub.split_file(f"{root.rstrip('/')}/-", field="data.root")
    folder = place.removesuffix("-")
    try:
        files = hub.list_files(repo, _commit(repo))
    except UserError:
        return ()
    return tuple(file.path.removeprefix(folder) for file in files if file.path.startswith(folder))


def parent_uri(uri: str) -> Address:
    """The folder of a file's URI: where relative media paths start unless a root is given."""
    if uri.startswith("https://"):
        parts = urlsplit(reveal(uri))
        return Address(urlunsplit((parts.scheme, parts.netloc, parts.path.rpartition("/")[0], parts.query, "")))
    return Address(uri.rpartition("/")[0])


def meta_path(path: str, meta: str, root: str | None) -> Address:
    """A path in the meta JSON at `meta`; a relative one starts at `root`, else at the JSON's folder."""
    if path.startswith("/") or "://" in path:
        return Address(path)
    return Address(f"{reveal(root or parent_uri(meta)).rstrip('/')}/{path}".rstrip("/"))


@lru_cache(maxsize=64)
def _archive(root: str, _process: int) -> Archive:
    """The archive for all threads of this process; a fork would share the file position, hence the argument."""
    field = "data.root"
    place = root.partition("?")[0]
    path = fetch_file(Address(reveal(root).rstrip("/")), field=field)
    name = f"{path}\n{path.stat().st_size} {path.stat().st_mtime_ns}"
    if is_packed_tar(root):
        packed = path
        path = _cache().file(f"decompressed\n{name}", lambda target: decompress(packed, target, place))
    return open_archive(path, place, lambda write: _cache().file(f"index\n{name}", write))


@lru_cache(maxsize=64)
def _archive_folders(root: Address, process: int) -> dict[str, list[str]]:
    """Paths of the files of each folder of an archive."""
    folders: dict[str, list[str]] = defaultdict(list)
    for name in _archive(root, process).names():
        folders[name.rpartition("/")[0]].append(name)
    return dict(folders)


@lru_cache(maxsize=1024)
def _place_in_archive(root: Address) -> tuple[Address, str] | None:
    """The archive that a root is, or leads into, and the folder in it (`photos/`, or nothing); None without one."""
    found = ((Address(archive), folder) for archive, folder in archives_in(reveal(root)))
    return next((place for place in found if not _is_local_folder(place[0], "data.root")), None)


def _is_local_folder(root: str, field: str) -> bool:
    return not root.startswith((*_REMOTE, "hf://")) and local_path(root, field=field).is_dir()


def commit_to_pin(uri: str, *, field: str) -> str | None:
    """The commit that a Hub source has now, when its *.py are left out because it names a branch or tag; else None."""
    if not uri.startswith("hf://"):
        return None
    repo = hub.repository(uri, field=field)
    if hub.pinned_commit(repo):
        return None
    commit = hub.commit_of(repo)
    return commit if any(is_code(file.path) for file in hub.list_files(repo, commit)) else None


def _fetch_repository(repo: hub.Repository, weights: bool) -> Path:
    commit, with_code = hub.commit_of(repo), hub.pinned_commit(repo) is not None

    def make(folder: Path) -> None:
        wanted = [file for file in hub.list_files(repo, commit) if not is_unused(file.path)]
        wanted = [file for file in wanted if weights or not is_weights(file.path)]
        wanted = [file for file in wanted if with_code or not is_code(file.path)]
        with announced(repo.uri, folder, sum(file.size for file in wanted)):
            hub.download(repo, commit, wanted, folder)

    def is_intact(folder: Path) -> bool:
        return hub.has_files(repo, commit, folder) and (with_code or not any(folder.rglob("*.py")))

    name = _repository_name(repo, commit, weights=weights)
    return _cache().folder(name, make, is_intact, while_another_makes=partial(announced, repo.uri))


def _repository_name(repo: hub.Repository, commit: str, *, weights: bool) -> str:
    """The name of a commit's copy in the cache."""
    without_code = "" if hub.pinned_commit(repo) else ", without code"
    return f"hf {repo.kind} {repo.name} {commit} {'all' if weights else 'without weights'}{without_code}"


def _fetch_from_hub(uri: str, field: str) -> Path:
    repo, path = hub.split_file(uri, field=field)
    commit = _commit(repo)

    def make(folder: Path) -> None:
        file = hub.find_file(repo, commit, path)
        if file is None:
            raise UserError("NotFound", f"found no file {uri}; check the path", field)
        with announced(uri, folder, file.size):
            hub.download(repo, commit, [file], folder)

    name = f"hf {repo.kind} {repo.name} {commit} file {path}"
    return _cache().folder(name, make) / path


@lru_cache(maxsize=64)
def _commit(repo: hub.Repository) -> str:
    """The commit of the repository's revision, looked up once in each process."""
    return hub.commit_of(repo)


def _present_folder(path: Path, uri: str, field: str) -> Path:
    if not path.is_dir():
        raise UserError("NotFound", f"found no folder {uri}; check the path", field)
    return path


@lru_cache(maxsize=64)
def _open(uri: str, field: str) -> Storage | HttpsSource:
    return HttpsSource(uri, field=field) if uri.startswith("https://") else open_storage(uri, field=field)


@lru_cache(maxsize=1)
def _cache() -> Cache:
    return open_cache()
