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

from internvl_api.run_config import RunConfig
from internvl_api.spec import Hub

from internvl_trainer.artifacts.disk_space import scratch_folder
from internvl_trainer.artifacts.manifest import Manifest, ManifestFile, fetch_files
from internvl_trainer.artifacts.storage import Storage, is_full
from internvl_trainer.errors import AccessDenied, Unavailable, UserError
from internvl_trainer.stages.publish.collect import EVALUATION, HUB_CARD, MODEL_CARD, MODEL_FOLDERS, REPORT, RUN_CONFIG

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

Result = TypeVar("Result")
_PARALLEL_FILES = 2  # so many are on the scratch disk: one arrives while the other leaves
_DEFAULT_BRANCH = "main"
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")


def publish_to_hub(
    config: RunConfig, hub: Hub, storage: Storage, folder: str, manifest: Manifest, tell: Callable[[str], object]
) -> str:
    """Send what a model's user needs of `folder`; the URL of the commit.

    Raises AccessDenied `HubAccessDenied`, Unavailable `HubUnavailable` and UserError `HubRefused` or `DiskFull`; the
    files of `folder` stay in storage whatever happens.
    """
    files = files_for_hub(manifest, config.merge.formats)
    talk = _Talk(hub, f"{storage.uri}/{folder}")
    talk.prepare()
    with scratch_folder(space_needed(list(files.values())), "publishing to the Hub") as scratch:

        def send(name: str) -> CommitOperationAdd:
            arrived = _fetch(storage, folder, files[name], scratch)
            return talk.send(name, arrived)

        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            operations = list(_counted(pool.map(send, files), len(files), tell))
        return talk.commit(operations, f"Fine-tuned by {config.job}", f"Base model: {config.model.source}")


def files_for_hub(manifest: Manifest, formats: Sequence[str]) -> dict[str, ManifestFile]:
    """Path in the repository to file: one model, at the root, and its record.

    The model is that of the first format asked for, else what training wrote: a whole model or an adapter.
    """
    folders = [*(MODEL_FOLDERS[name] for name in formats), MODEL_FOLDERS["upstream"], "adapter/"]
    root = next(folder for folder in folders if manifest.named(folder))
    model = {file.path.removeprefix(root): file for file in manifest.named(root)}
    names = {HUB_CARD: MODEL_CARD, RUN_CONFIG: RUN_CONFIG, EVALUATION: EVALUATION}
    record = {names[file.path]: file for file in manifest.files if file.path in names}
    return model | record | {file.path: file for file in manifest.named(f"{REPORT}/")}


def space_needed(files: Sequence[ManifestFile]) -> int:
    """Bytes of scratch disk: the largest files that are on their way together."""
    return sum(sorted((file.size for file in files), reverse=True)[:_PARALLEL_FILES])


class _Talk:
    """What is said to the Hub about one repository, and its refusals in the user's words."""

    def __init__(self, hub: Hub, stored: str) -> None:
        self._hub, self._stored = hub, stored
        self._api = _open_api()

    def prepare(self) -> None:
        """The repository and the branch, made where they are not there."""
        repository, revision = self._hub.repository, self._hub.revision
        self._ask(lambda: self._api.create_repo(repository, private=self._hub.private, exist_ok=True))
        if revision != _DEFAULT_BRANCH:
            self._ask(lambda: self._api.create_branch(repository, branch=revision, exist_ok=True))

    def send(self, name: str, path: Path) -> CommitOperationAdd:
        """Send a file if it is a large one, and delete it; a small one stays until it goes with the commit."""
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(name, path)
        self._ask(lambda: self._api.preupload_lfs_files(self._hub.repository, [operation], revision=self._hub.revision))
        if operation.path_or_fileobj == b"":  # sent, and let go
            path.unlink()
        return operation

    def commit(self, operations: list[CommitOperationAdd], summary: str, description: str) -> str:
        """All files at once; where none differs from what is there, the commit that is there."""
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
        from httpx2 import HTTPError  # what huggingface_hub talks with, and lets through when nobody answers

        try:
            return ask()
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and is_full(error):  # our disk, for the scratch folder to name
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
                f"{place} cannot be written to with this HF_TOKEN (HTTP {status}); the Secret needs, under the key "
                "HF_TOKEN, a token that may create and write repositories of "
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
    from huggingface_hub.utils import disable_progress_bars

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise AccessDenied(
            "HubAccessDenied",
            "found no HF_TOKEN; name a Secret that has, under the key HF_TOKEN, a token with the right to write",
            "spec.secrets.huggingFace",
        )
    disable_progress_bars()  # the stage says by itself how far it is
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)


def _fetch(storage: Storage, folder: str, file: ManifestFile, scratch: Path) -> Path:
    fetch_files(storage, folder, [file], scratch)
    return scratch / file.path


def _counted(operations: Iterator[Any], total: int, tell: Callable[[str], object]) -> Iterator[Any]:
    for number, operation in enumerate(operations, 1):
        tell(f"{number} of {total} files are at the Hub, which shows them when all are")
        yield operation


def _answer_of(error: BaseException | None) -> HfHubHTTPError | None:
    """The Hub's answer among an error and its causes."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _status_in_words(error: Exception) -> int | None:
    """Of an error of hf_xet, the Hub's client for large files, which has the answer only in its text."""
    found = _XET_STATUS.search(str(error))
    return int(found[1]) if found else 403 if isinstance(error, PermissionError) else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
