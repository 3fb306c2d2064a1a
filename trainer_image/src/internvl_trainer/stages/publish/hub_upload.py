"""Publishing to the Hugging Face Hub: file by file through the scratch disk, then one commit that shows them all.

Until that commit the repository looks as before. After a kill, the Hub knows the large files that came whole by their
digest and asks for none of them again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from internvl_api.spec import Hub

from internvl_trainer.artifacts.disk_space import scratch_folder
from internvl_trainer.artifacts.manifest import Manifest, ManifestFile, fetch_files
from internvl_trainer.artifacts.output_layout import (
    ARTIFACTS,
    EVALUATION,
    HUB_CARD,
    MODEL_CARD,
    MODEL_FOLDERS,
    REPORT,
    RUN_CONFIG,
)
from internvl_trainer.artifacts.storage import Storage, is_full
from internvl_trainer.errors import AccessDenied, Unavailable, UserError
from internvl_trainer.run_context import RunContext

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

Result = TypeVar("Result")
_PARALLEL_FILES = 2  # files on the scratch disk: one downloads while the other uploads
_DEFAULT_BRANCH = "main"
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")


def publish_to_hub(context: RunContext, hub: Hub, manifest: Manifest) -> str:
    """Send what a model's user needs of artifacts/, whose manifest is given; the URL of the commit.

    Raises AccessDenied `HubAccessDenied`, Unavailable `HubUnavailable` and UserError `HubRefused` or `DiskFull`; the
    files of artifacts/ stay in storage whatever happens.
    """
    config, storage = context.config, context.storage
    files = files_for_hub(manifest, config.merge.formats)
    repository = _HubRepository(hub, f"{storage.uri}/{ARTIFACTS}")
    repository.prepare()
    with scratch_folder(space_needed(list(files.values())), "publishing to the Hub") as scratch:

        def send(name: str) -> CommitOperationAdd:
            arrived = _fetch(storage, files[name], scratch)
            return repository.send(name, arrived)

        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            operations = list(_counted(pool.map(send, files), len(files), context.reporter.doing))
        return repository.commit(operations, f"Fine-tuned by {config.job}", f"Base model: {config.model.source}")


def files_for_hub(manifest: Manifest, formats: Sequence[str]) -> dict[str, ManifestFile]:
    """Path in the repository to file: one model at the root, and its record.

    The model is that of the first format asked for, else what training wrote: a whole model or an adapter.
    """
    folders = [*(MODEL_FOLDERS[name] for name in formats), MODEL_FOLDERS["upstream"], "adapter/"]
    root = next(folder for folder in folders if manifest.named(folder))
    model = {file.path.removeprefix(root): file for file in manifest.named(root)}
    names = {HUB_CARD: MODEL_CARD, RUN_CONFIG: RUN_CONFIG, EVALUATION: EVALUATION}
    record = {names[file.path]: file for file in manifest.files if file.path in names}
    return model | record | {file.path: file for file in manifest.named(f"{REPORT}/")}


def space_needed(files: Sequence[ManifestFile]) -> int:
    """Scratch disk in bytes: the largest files that are in transit together."""
    return sum(sorted((file.size for file in files), reverse=True)[:_PARALLEL_FILES])


class _HubRepository:
    """The calls to the Hub about one repository; its errors become UserErrors."""

    def __init__(self, hub: Hub, stored: str) -> None:
        self._hub, self._stored = hub, stored
        self._api = _open_api()

    def prepare(self) -> None:
        """Create the repository and the branch where they do not exist."""
        repository, revision = self._hub.repository, self._hub.revision
        self._ask(lambda: self._api.create_repo(repository, private=self._hub.private, exist_ok=True))
        if revision != _DEFAULT_BRANCH:
            self._ask(lambda: self._api.create_branch(repository, branch=revision, exist_ok=True))

    def send(self, name: str, path: Path) -> CommitOperationAdd:
        """Upload a large file and delete it here; a small file stays until the commit."""
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(name, path)
        self._ask(lambda: self._api.preupload_lfs_files(self._hub.repository, [operation], revision=self._hub.revision))
        if operation.path_or_fileobj == b"":  # uploaded
            path.unlink()
        return operation

    def commit(self, operations: list[CommitOperationAdd], summary: str, description: str) -> str:
        """Commit all files at once; the URL of the commit, an existing one where no file differs."""
        made = self._ask(
            lambda: self._api.create_commit(
                self._hub.repository,
                operations,
                commit_message=summary,
                commit_description=description,
                revision=self._hub.revision,
            )
        )
        return str(made.commit_url)

    def _ask(self, ask: Callable[[], Result]) -> Result:
        from httpx2 import HTTPError  # huggingface_hub's HTTP client, whose errors it lets through

        try:
            return ask()
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and is_full(error):  # the scratch disk is full; scratch_folder names it
                raise
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> UserError:
        place = f"the Hub's repository {self._hub.repository} (revision {self._hub.revision})"
        kept = f"The files are in {self._stored}"
        answer = _answer_of(error)
        status = answer.response.status_code if answer else _status_in_words(error)
        if status is None:
            if isinstance(error, ValueError):
                return UserError("HubRefused", f"{place}: {_first_line(error)}. {kept}", "spec.publish.hub")
            return Unavailable("HubUnavailable", f"{place}: {_first_line(error)}. {kept}", "spec.publish.hub")
        if status in (401, 403, 404):
            return AccessDenied(
                "HubAccessDenied",
                f"{place} cannot be written to with this {_token_variable()} (HTTP {status}); the Secret needs, under "
                f"the key {_token_variable()}, a token that may create and write repositories of "
                f"{self._hub.repository.partition('/')[0]} (role write, or fine-grained with write access to them). "
                f"{kept}",
                "spec.secrets.huggingFace",
            )
        if status == 429 or status >= 500:
            return Unavailable("HubUnavailable", f"{place}: HTTP {status}; try again later. {kept}", "spec.publish.hub")
        said = (answer and answer.server_message) or _first_line(error)
        return UserError("HubRefused", f"{place}: HTTP {status}: {said}. {kept}", "spec.publish.hub")


def _open_api() -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    token = os.environ.get(_token_variable())
    if not token:
        raise AccessDenied(
            "HubAccessDenied",
            "found neither HF_WRITE_TOKEN nor HF_TOKEN; name a Secret that has, under one of these keys, a token with "
            "the right to write",
            "spec.secrets.huggingFace",
        )
    disable_progress_bars()  # the stage reports its own progress
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)


def _token_variable() -> str:
    """The variable with the token to publish with; other stages never get HF_WRITE_TOKEN."""
    return "HF_WRITE_TOKEN" if os.environ.get("HF_WRITE_TOKEN") else "HF_TOKEN"


def _fetch(storage: Storage, file: ManifestFile, scratch: Path) -> Path:
    fetch_files(storage, ARTIFACTS, [file], scratch)
    return scratch / file.path


def _counted(operations: Iterator[Any], total: int, tell: Callable[[str], object]) -> Iterator[Any]:
    for number, operation in enumerate(operations, 1):
        tell(f"{number} of {total} files are at the Hub, which shows them when all are")
        yield operation


def _answer_of(error: BaseException | None) -> HfHubHTTPError | None:
    """The Hub's answer, from an error or its causes."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _status_in_words(error: Exception) -> int | None:
    """The HTTP status of an error of hf_xet, the Hub's client for large files, which has it only in its text."""
    found = _XET_STATUS.search(str(error))
    return int(found[1]) if found else 403 if isinstance(error, PermissionError) else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
