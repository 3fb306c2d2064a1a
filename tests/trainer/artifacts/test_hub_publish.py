"""Publishing to a stand-in of the Hub's API (see hub_write_stand_in.py); the client is huggingface_hub itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from internvl_api.constants import ExitCode
from internvl_trainer.artifacts.disk_space import scratch_folder
from internvl_trainer.artifacts.manifest import Manifest, ManifestFile, read_manifest
from internvl_trainer.artifacts.storage import Storage, open_storage
from internvl_trainer.errors import AccessDenied, Unavailable, UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.run_context import RunContext
from internvl_trainer.stages.publish import run as publish
from internvl_trainer.stages.publish.hub_upload import files_for_hub
from trainer.artifacts.finished_run import leave_run, sha256, shards
from trainer.artifacts.hub_write_stand_in import HubWriteStandIn
from trainer.artifacts.report_stand_in import HUB_CARD, PAGE, stand_ins
from trainer.artifacts.web_server import serving
from trainer.runs import environment, make_config, write_config

pytestmark = pytest.mark.slow

HUB: dict[str, Any] = {
    "secrets": {"huggingFace": "hf-token"},
    "publish": {"hub": {"repository": "team/tuned"}},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubWriteStandIn]:
    """The stand-in, with the variables that lead to it."""
    made = HubWriteStandIn()
    with serving(made):
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", made.token)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        for name, module in stand_ins().items():
            monkeypatch.setitem(sys.modules, name, module)
        yield made


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "output"), field="spec.output")


@pytest.fixture
def reporter() -> Reporter:
    return Reporter("team/run", "publish")


def test_the_model_its_card_and_its_record_come_in_one_commit(
    hub: HubWriteStandIn, storage: Storage, reporter: Reporter
) -> None:
    config = make_config(storage.uri, **HUB)
    expected = leave_run(storage, config)
    result = publish(RunContext("publish", config, storage, reporter))
    repository = hub.repositories["team/tuned"]
    model = {name.removeprefix("model/"): data for name, data in expected.items() if name.startswith("model/")}
    record = {"README.md": HUB_CARD.encode(), "run.yaml": config.to_yaml().encode(), "report/index.html": PAGE}
    assert repository.branches["main"].items() >= (model | record).items()
    assert repository.branches["main"].keys() - (model | record).keys() == {".gitattributes", "report/loss.png"}
    assert repository.private
    assert len(repository.commits) == 2
    assert result.artifacts["hub"] == f"{hub.url}/team/tuned/commit/{repository.commits[1]}"
    assert result.artifacts["hub"] in result.message


def test_another_branch_and_a_public_repository(hub: HubWriteStandIn, storage: Storage, reporter: Reporter) -> None:
    target = {"repository": "team/tuned", "revision": "v2", "private": False}
    config = make_config(storage.uri, **{**HUB, "publish": {"hub": target}})
    leave_run(storage, config)
    publish(RunContext("publish", config, storage, reporter))
    repository = hub.repositories["team/tuned"]
    assert not repository.private
    assert repository.branches["main"].keys() == {".gitattributes"}
    assert "model-00001-of-00002.safetensors" in repository.branches["v2"]


def test_publishing_again_what_is_there_makes_no_commit(
    hub: HubWriteStandIn, storage: Storage, reporter: Reporter
) -> None:
    config = make_config(storage.uri, **HUB)
    leave_run(storage, config)
    first = publish(RunContext("publish", config, storage, reporter)).artifacts["hub"]
    storage.delete("stages/publish/manifest.json")
    sent = hub.uploads()
    assert publish(RunContext("publish", config, storage, reporter)).artifacts["hub"] == first
    assert hub.uploads() == sent
    assert len(hub.repositories["team/tuned"].commits) == 2


def named(*paths: str) -> Manifest:
    return Manifest("print", [ManifestFile(path, 1, "0" * 64) for path in paths])


@pytest.mark.parametrize(
    ("paths", "formats", "expected"),
    [
        pytest.param(["adapter/a", "metrics.jsonl"], [], {"a": "adapter/a"}, id="an adapter"),
        pytest.param(["adapter/a", "model/b"], ["upstream"], {"b": "model/b"}, id="merged"),
        pytest.param(["model/a", "model-hf/b"], ["hf"], {"b": "model-hf/b"}, id="hf asked for"),
        pytest.param(["model/a", "model-hf/b"], ["upstream", "hf"], {"a": "model/a"}, id="the first of two formats"),
        pytest.param(["model/a"], [], {"a": "model/a"}, id="full"),
        pytest.param(
            [
                "model/a",
                "model/README.md",
                "README.md",
                "README.hub.md",
                "run.yaml",
                "evaluation.json",
                "report/x.png",
                "preflight.json",
            ],
            [],
            {
                "a": "model/a",
                "README.md": "README.hub.md",
                "run.yaml": "run.yaml",
                "evaluation.json": "evaluation.json",
                "report/x.png": "report/x.png",
            },
            id="the Hub's card takes the place of both others",
        ),
    ],
)
def test_what_goes_to_the_hub(paths: list[str], formats: list[str], expected: dict[str, str]) -> None:
    assert {name: file.path for name, file in files_for_hub(named(*paths), formats).items()} == expected


DENIED = "cannot be written to with this HF_TOKEN (HTTP {status}); the Secret needs, under the key HF_TOKEN, a token"
COMMIT = "/api/models/team/tuned/commit/main"
CREATE = "/api/repos/create"


@pytest.mark.parametrize(
    ("path", "status", "kind", "reason", "words"),
    [
        pytest.param(CREATE, 403, AccessDenied, "HubAccessDenied", DENIED.format(status=403), id="403 at the start"),
        pytest.param(COMMIT, 403, AccessDenied, "HubAccessDenied", DENIED.format(status=403), id="403 at the commit"),
        pytest.param(COMMIT, 404, AccessDenied, "HubAccessDenied", DENIED.format(status=404), id="404"),
        pytest.param(CREATE, 503, Unavailable, "HubUnavailable", "HTTP 503; try again later", id="503 at the start"),
        pytest.param(COMMIT, 500, Unavailable, "HubUnavailable", "HTTP 500; try again later", id="500 at the commit"),
        pytest.param(COMMIT, 429, Unavailable, "HubUnavailable", "HTTP 429; try again later", id="too many requests"),
        pytest.param(COMMIT, 413, UserError, "HubRefused", "HTTP 413", id="too large"),
        pytest.param("/lfs/", 403, AccessDenied, "HubAccessDenied", DENIED.format(status=403), id="403 of a file"),
    ],
)
def test_what_the_hub_refuses_is_named_and_the_output_stays(
    hub: HubWriteStandIn,
    storage: Storage,
    reporter: Reporter,
    path: str,
    status: int,
    kind: type[UserError],
    reason: str,
    words: str,
) -> None:
    config = make_config(storage.uri, **HUB)
    leave_run(storage, config)
    hub.refused_when = lambda request: status if request.path.startswith(path) else None
    with pytest.raises(kind) as caught:
        publish(RunContext("publish", config, storage, reporter))
    assert type(caught.value) is kind
    assert caught.value.reason == reason
    assert words in caught.value.message
    assert "team/tuned" in caught.value.message
    assert f"The files are in {storage.uri}/artifacts" in caught.value.message
    assert read_manifest(storage, "artifacts") is not None
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())
    hub.refused_when = lambda _: None
    assert "hub" in publish(RunContext("publish", config, storage, reporter)).artifacts


@pytest.mark.parametrize("token", [pytest.param("hf_wrong", id="wrong"), pytest.param("", id="none")])
def test_a_token_that_may_not_write(
    hub: HubWriteStandIn, storage: Storage, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    config = make_config(storage.uri, **HUB)
    leave_run(storage, config)
    with pytest.raises(AccessDenied) as caught:
        publish(RunContext("publish", config, storage, reporter))
    assert (caught.value.reason, caught.value.where) == ("HubAccessDenied", "spec.secrets.huggingFace")
    assert "HF_TOKEN" in caught.value.message
    assert hub.repositories == {}


def test_publishing_prefers_the_token_that_only_it_gets(
    hub: HubWriteStandIn, storage: Storage, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_may_only_read")
    monkeypatch.setenv("HF_WRITE_TOKEN", hub.token)
    config = make_config(storage.uri, **HUB)
    leave_run(storage, config)
    assert "hub" in publish(RunContext("publish", config, storage, reporter)).artifacts
    monkeypatch.setenv("HF_WRITE_TOKEN", "hf_wrong")
    with pytest.raises(AccessDenied, match="with this HF_WRITE_TOKEN"):
        publish(RunContext("publish", make_config(storage.uri, **HUB), storage, reporter))


def test_a_token_that_the_hubs_other_store_refuses(
    hub: HubWriteStandIn, storage: Storage, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Xet, which the Hub itself uses for large files, has its own client and errors."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.refused_when = lambda request: 403 if "xet-write-token" in request.path else None
    config = make_config(storage.uri, **HUB)
    leave_run(storage, config)
    with pytest.raises(AccessDenied) as caught:
        publish(RunContext("publish", config, storage, reporter))
    assert caught.value.reason == "HubAccessDenied"
    assert any("xet-write-token" in request.path for request in hub.requests)


def test_a_hub_that_is_away(
    hub: HubWriteStandIn, storage: Storage, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    config = make_config(storage.uri, **HUB)
    leave_run(storage, config)
    with pytest.raises(Unavailable) as caught:
        publish(RunContext("publish", config, storage, reporter))
    assert caught.value.reason == "HubUnavailable"


def test_large_files_go_by_xet_as_they_do_to_the_hub_itself(
    hub: HubWriteStandIn, storage: Storage, tmp_path: Path
) -> None:
    config = make_config(storage.uri, **HUB)
    model = shards(3, 100_000)
    leave_run(storage, config, model)
    path = write_config(config, tmp_path)
    command = [sys.executable, "-m", "trainer.artifacts.report_stand_in", "publish", "--config", str(path)]
    env = environment(tmp_path, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.OK, done.stderr
    published = hub.repositories["team/tuned"].branches["main"]
    assert {name: published[name.removeprefix("model/")].decode() for name in model} == {
        name: sha256(content) for name, content in model.items()
    }
    assert sum(len(block) for block in hub.blocks.values()) >= sum(len(content) for content in model.values())
    assert hub.uploads() == []
    assert published["README.md"] == HUB_CARD.encode()


def test_killed_three_times_on_the_way_to_the_hub(hub: HubWriteStandIn, storage: Storage, tmp_path: Path) -> None:
    config = make_config(storage.uri, **HUB)
    model = shards(4, 100_000)
    leave_run(storage, config, model)
    path = write_config(config, tmp_path)
    digests = [sha256(content) for content in model.values()]
    command = [sys.executable, "-m", "trainer.artifacts.report_stand_in", "publish", "--config", str(path)]
    env = environment(tmp_path, HF_HUB_DISABLE_XET="1", PYTHONPATH=os.pathsep.join(sys.path))
    whole: list[tuple[set[str], int]] = []  # at each kill: large files that are there, and uploads so far
    for place in (f"/lfs/{digests[1]}", f"/lfs/{digests[3]}", COMMIT):
        hub.reached.clear()
        hub.held_when = lambda request, place=place: request.path == place  # type: ignore[misc]
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        try:
            assert hub.reached.wait(60)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert hub.repositories["team/tuned"].branches["main"].keys() == {".gitattributes"}
        whole.append((set(hub.large), len(hub.uploads())))
    hub.held_when = lambda _: False
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.OK, done.stderr
    assert hub.token not in done.stderr
    published = hub.repositories["team/tuned"].branches["main"]
    assert {name: sha256(published[name.removeprefix("model/")]) for name in model} == {
        name: sha256(content) for name, content in model.items()
    }
    assert set(digests) <= whole[2][0]
    for there, sent in whole:
        assert there.isdisjoint(hub.uploads()[sent:])


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes the scratch disk a real one of the given size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("file systems may not be mounted here")
        monkeypatch.setattr(tempfile, "tempdir", str(disk))

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


def test_a_model_goes_through_a_scratch_disk_that_holds_a_part_of_it(
    hub: HubWriteStandIn, storage: Storage, reporter: Reporter, small_disk: Callable[[str], None]
) -> None:
    config = make_config(storage.uri, **HUB)
    model = shards(6, 30 << 20)
    leave_run(storage, config, model)
    small_disk("70M")
    publish(RunContext("publish", config, storage, reporter))
    assert hub.repositories["team/tuned"].branches["main"].keys() >= {name.removeprefix("model/") for name in model}


def test_a_scratch_disk_that_is_too_small_is_named_before_anything_is_sent(
    hub: HubWriteStandIn, storage: Storage, reporter: Reporter, small_disk: Callable[[str], None]
) -> None:
    config = make_config(storage.uri, **HUB)
    leave_run(storage, config, shards(2, 100 << 20))
    small_disk("150M")
    with pytest.raises(UserError) as caught:
        publish(RunContext("publish", config, storage, reporter))
    assert caught.value.reason == "DiskFull"
    assert "publishing to the Hub needs 0.2 GiB there, 0.1 GiB are free" in caught.value.message
    assert hub.uploads() == []
    assert read_manifest(storage, "artifacts") is not None


def test_a_scratch_disk_that_fills_up_is_named(small_disk: Callable[[str], None]) -> None:
    small_disk("1M")
    with (
        pytest.raises(UserError, match="the disk is full; the report needs") as caught,
        scratch_folder(1000, "the report") as folder,
    ):
        (folder / "file").write_bytes(bytes(2 << 20))
    assert caught.value.reason == "DiskFull"


def test_an_output_that_is_full_is_named(tmp_path: Path, small_disk: Callable[[str], None]) -> None:
    small_disk("1M")
    storage = open_storage(str(tmp_path / "disk"), field="spec.output")
    (tmp_path / "file").write_bytes(bytes(2 << 20))
    with pytest.raises(Unavailable, match="No space left on device; free some space there") as caught:
        storage.upload(tmp_path / "file", "artifacts/file")
    assert (caught.value.reason, caught.value.where) == ("DiskFull", "spec.output")
    assert not list(storage.list())
