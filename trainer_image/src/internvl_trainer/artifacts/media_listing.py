"""Media below a root: read a local file, list a folder, and find the path that a wrong one probably means."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from internvl_trainer.errors import AccessDenied, BadFile

MOST_NAMES = 100_000
"""Maximum names of a root that a wrong path is compared with."""
MOST_IN_FOLDER = 100_000
"""Maximum files of a folder of frames; one more is listed where there are more."""

_MOST_ALIKE = 8  # remembered names with one file name
_MOST_FOLDERS = 20_000  # visited while names are collected


class MediaFolder(IsADirectoryError):
    """The path is a folder; `files` are the paths of its files below the root."""

    def __init__(self, path: str, files: Iterable[str]) -> None:
        super().__init__(path)
        self.files = list(files)


class MediaMissing(FileNotFoundError):
    """No file has this path; `hint` names the nearest one and the next step, or is empty."""

    def __init__(self, path: str, hint: str = "") -> None:
        super().__init__(path)
        self.hint = hint


class NearestPaths:
    """Finds the path below a root that a wrong path probably means; a look-up costs a few comparisons."""

    def __init__(self, root: str, paths: Iterable[str]) -> None:
        """`root`: its address, for messages; `paths`: those below it."""
        self._root = root.rstrip("/")
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, str] = {}
        for path in islice(paths, MOST_NAMES):
            for reading in {path, gbk_reading(path) or path}:
                name = _folded(reading.rpartition("/")[2])
                alike = self._by_name.setdefault(name, [])
                if len(alike) < _MOST_ALIKE:
                    alike.append(path)
                self._by_stem.setdefault(name.rpartition(".")[0] or name, path)

    def hint(self, wanted: str) -> str:
        """The end of a message "… is not below …": the nearest path and the next step; empty when none is near."""
        name = _folded(wanted.rpartition("/")[2])
        if alike := self._by_name.get(name):
            return self._explain(wanted, max(alike, key=lambda path: _common_parts(path, wanted)))
        other = self._by_stem.get(name.rpartition(".")[0] or name)
        return f"; found {other!r}, which has another suffix" if other else ""

    def _explain(self, wanted: str, found: str) -> str:
        if found.endswith(f"/{wanted}"):
            folder = found.removesuffix(f"/{wanted}")
            return f"; found {found!r}: if it is meant, set root to {self._root}/{folder}"
        if wanted.endswith(f"/{found}"):
            extra = wanted.removesuffix(f"/{found}")
            parent, _, last = self._root.rpartition("/")
            step = f"set root to {parent}" if last == extra else f"remove {extra + '/'!r} from the paths"
            return f"; found {found!r}: if it is meant, {step}"
        if _folded(found) == _folded(wanted):
            return f"; found {found!r}, which differs in case or in how accents are written"
        reading = gbk_reading(found)
        if reading is not None and _folded(reading).endswith(_folded(wanted)):
            return f"; found {found!r}, which is {reading!r} in GBK: pack the archive again with names in UTF-8"
        return f"; the nearest path is {found!r}"


def gbk_reading(name: str) -> str | None:
    """A zip's name, which is code page 437 when it is not marked as UTF-8, as GBK; None where it is no GBK."""
    if name.isascii():
        return None
    try:
        return name.encode("cp437").decode("gb18030")
    except UnicodeError:
        return None


def read_below(root: Path, name: str) -> bytes:
    """The bytes of a file below a local root.

    Raises FileNotFoundError, AccessDenied, or BadFile for a link that leaves the root.
    """
    try:
        path = (root / name).resolve()
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, or a loop of links
        raise FileNotFoundError(f"{root}/{name}") from error
    if not path.is_relative_to(root.resolve()):
        raise BadFile("PathOutsideRoot", f"found {name!r}, a link that leaves {root}", "data.root")
    if not found:
        raise FileNotFoundError(path)
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise AccessDenied("AccessDenied", f"{path}: {error.strerror}", "data.root") from error


def files_of_folder(root: Path, name: str) -> list[str] | None:
    """Paths of the files in a folder below a local root; None when it is no folder, or a link out of the root."""
    try:
        folder = (root / name).resolve()
        if not folder.is_relative_to(root.resolve()):
            return None
        with os.scandir(folder) as entries:
            return [f"{name}/{entry.name}" for entry in islice(entries, MOST_IN_FOLDER + 1) if entry.is_file()]
    except (OSError, RuntimeError):  # no folder, a name that is too long, or a loop of links
        return None


def paths_below(root: Path) -> Iterator[str]:
    """Paths of files below a local folder, its own files first; of a huge folder, those in its first sub-folders."""
    waiting, visited = [root], 0
    while waiting and visited < _MOST_FOLDERS:
        folder, visited = waiting.pop(0), visited + 1
        try:
            entries = sorted(islice(folder.iterdir(), MOST_NAMES))
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                waiting.append(entry)
            elif not entry.is_dir():
                yield entry.relative_to(root).as_posix()


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _common_parts(path: str, wanted: str) -> int:
    """Number of equal parts at the end of two paths."""
    count = 0
    for one, other in zip(reversed(PurePosixPath(path).parts), reversed(PurePosixPath(wanted).parts), strict=False):
        if _folded(one) != _folded(other):
            break
        count += 1
    return count
