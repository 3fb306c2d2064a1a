"""Repositories of the Hugging Face Hub: listed, downloaded into a folder, and checked against the Hub's digests."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from internvl_trainer.artifacts.ranges import check_answer, check_length
from internvl_trainer.artifacts.storage import StoredFile, inside
from internvl_trainer.errors import AccessDenied, Unavailable, UserError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_REPOSITORY = re.compile(r"^hf://(?P<kind>datasets/)?(?P<name>[^/]+/[^/@]+)(?:@(?P<revision>.+))?$")
_FILE = re.compile(r"^hf://(?P<kind>datasets/)?(?P<name>[^/]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<path>.+)$")
_PARALLEL_FILES = 8
Result = TypeVar("Result")


class Repository(NamedTuple):
    """Where a URI points; `revision` is a branch, tag or commit, or None for the default branch."""

    uri: str
    field: str
    kind: str
    name: str
    revision: str | None


def repository(uri: str, *, field: str) -> Repository:
    """The repository of hf://[datasets/]owner/repository[@revision]. Raises UserError for any other URI."""
    match = _REPOSITORY.match(uri)
    if match is None:
        raise UserError("UnsupportedSource", f"found {uri!r}, expected hf://owner/repository@revision", field)
    return Repository(uri, field, "dataset" if match["kind"] else "model", match["name"], match["revision"])


def split_file(uri: str, *, field: str) -> tuple[Repository, str]:
    """Repository and path of hf://[datasets/]owner/repository[@revision]/path; a revision then holds no slash."""
    match = _FILE.match(uri)
    if match is None:
        raise UserError(
            "UnsupportedSource", f"found {uri!r}, expected hf://datasets/owner/repository@revision/path", field
        )
    found = Repository(uri, field, "dataset" if match["kind"] else "model", match["name"], match["revision"])
    return found, inside(match["path"], field=field)


def pinned_commit(repo: Repository) -> str | None:
    """The revision when it is a full commit hash, whose files never change; None for a branch or a tag."""
    return repo.revision if repo.revision and re.fullmatch(r"[0-9a-f]{40}", repo.revision) else None


def commit_of(repo: Repository) -> str:
    """The commit that the revision points to now; a full commit hash costs no request."""
    if commit := pinned_commit(repo):
        return commit
    from huggingface_hub import HfApi

    info = _ask(repo, lambda: HfApi().repo_info(repo.name, revision=repo.revision, repo_type=repo.kind))
    return str(info.sha)


def list_files(repo: Repository, commit: str) -> list[RepoFile]:
    """Every file of a commit, with size and digests."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def files() -> list[RepoFile]:
        tree = HfApi().list_repo_tree(repo.name, recursive=True, revision=commit, repo_type=repo.kind)
        return [entry for entry in tree if isinstance(entry, RepoFile)]

    return _ask(repo, files)


def download(repo: Repository, commit: str, files: Iterable[RepoFile], folder: Path) -> None:
    """Download files into `folder`, except those that an earlier attempt downloaded and checked."""
    arriving = folder / ".arriving"

    def one(file: RepoFile) -> None:
        path = folder / inside(file.path, field=repo.field)
        if path.exists():
            return
        fetched = _ask(repo, lambda: _fetch(repo, commit, file.path, arriving))
        _check(repo, file, fetched)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched, path)

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(one, files))
    shutil.rmtree(arriving, ignore_errors=True)


def read_start(repo: Repository, commit: str, path: str, length: int) -> bytes:
    """The first `length` bytes of a file."""
    return _stream(repo, commit, path, 0, length, lambda *_: None)


class HubFiles:
    """The files of a commit, to be read in parts; a commit never changes."""

    def __init__(self, repo: Repository, commit: str) -> None:
        self.uri, self._repo, self._commit = repo.uri, repo, commit

    def list(self) -> Iterator[StoredFile]:
        """Every file, with the Hub's digest as its etag."""
        return (StoredFile(file.path, file.size, digest_of(file)) for file in list_files(self._repo, self._commit))

    def read_range(self, file: StoredFile, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file; see RangeSource."""
        place = f"{self.uri}/{file.key}"

        def check(status: int, told: str | None) -> None:
            check_answer(place, status, told, start, end, file.size)

        data = _stream(self._repo, self._commit, file.key, start, end, check)
        check_length(place, data, end - start)
        return data


def _stream(
    repo: Repository, commit: str, path: str, start: int, end: int, check: Callable[[int, str | None], object]
) -> bytes:
    """Bytes [start, end) of a file. `check` gets the answer's status and Content-Range before anything is read."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its __init__ has no __all__
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    url = hf_hub_url(repo.name, path, revision=commit, repo_type=repo.kind, endpoint=os.environ.get("HF_ENDPOINT"))
    wanted = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}

    def get() -> bytes:
        data = bytearray()
        with get_session().stream("GET", url, headers={**build_hf_headers(), **wanted}, timeout=60) as response:
            hf_raise_for_status(response)
            check(response.status_code, response.headers.get("Content-Range"))
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= end - start:
                    break
        return bytes(data[: end - start])

    return _ask(repo, get)


def has_files(repo: Repository, commit: str, folder: Path) -> bool:
    """Whether every file in `folder`, but hidden ones, is one of the commit with the Hub's digest.

    Files that the Hub lists and the folder lacks were not asked for.
    """
    listed = {file.path: file for file in list_files(repo, commit)}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name.startswith("."):
            continue
        if name not in listed or path.is_symlink() or _digest(listed[name], path) != digest_of(listed[name]):
            return False
    return True


def digest_of(file: RepoFile) -> str:
    """The Hub's digest: sha256 for large files, git's blob digest for the others."""
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def find_file(repo: Repository, commit: str, path: str) -> RepoFile | None:
    """One file of a commit, or None."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found = _ask(repo, lambda: HfApi().get_paths_info(repo.name, [path], revision=commit, repo_type=repo.kind))
    return next((entry for entry in found if isinstance(entry, RepoFile)), None)


def _fetch(repo: Repository, commit: str, path: str, folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo.name, path, revision=commit, repo_type=repo.kind, local_dir=folder))


def _check(repo: Repository, file: RepoFile, path: Path) -> None:
    expected, found = digest_of(file), _digest(file, path)
    if found != expected:
        path.unlink()
        raise Unavailable(
            "DownloadCorrupt",
            f"{repo.uri}: {file.path} has digest {found}, the Hub says {expected}; try again",
            repo.field,
        )


def _digest(file: RepoFile, path: Path) -> str:
    """The digest of a local file, of the kind that the Hub has for it."""
    if file.lfs:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _ask(repo: Repository, ask: Callable[[], Result]) -> Result:
    """Call the Hub; its errors become UserErrors."""
    from httpx2 import HTTPError  # huggingface_hub's HTTP client, whose errors it lets through
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    uri, field = repo.uri, repo.field
    try:
        return ask()
    except RevisionNotFoundError as error:
        raise UserError("NotFound", f"{uri}: no revision {repo.revision!r} in that repository", field) from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise _denied(uri, field) from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise _denied(uri, field) from error
        raise Unavailable("HubUnavailable", f"{uri}: {type(error).__name__}: the Hub did not answer", field) from error
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise Unavailable("HubUnavailable", f"{uri}: {type(error).__name__}: the Hub did not answer", field) from error


def _denied(uri: str, field: str) -> AccessDenied:
    return AccessDenied(
        "AccessDenied",
        f"{uri}: not found, or not open to this token; check the name, accept the model's terms on the Hub, and "
        "put a token into the Secret spec.secrets.huggingFace (key HF_TOKEN)",
        field,
    )
