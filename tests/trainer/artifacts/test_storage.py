"""Storage behaves the same on disk and on S3, and says what is wrong in the user's words."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from internvl_trainer.artifacts.storage import ConditionsUnsupported, FolderStorage, Storage, inside, open_storage
from internvl_trainer.distributed import free_port
from internvl_trainer.errors import AccessDenied, Unavailable, UserError
from ivft_cluster.s3 import S3Server

from .s3_proxy import proxied


def test_what_is_written_is_read(storage: Storage, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * (40 << 12))  # 40 MiB: several parts
    storage.write("a/small.json", b"{}")
    storage.upload(large, "a/large")
    storage.copy("a/large", "b/copied")
    storage.download("b/copied", tmp_path / "back")
    assert storage.read("a/small.json") == b"{}"
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert [(file.key, file.size) for file in storage.list()] == [
        ("a/large", 40 << 20),
        ("a/small.json", 2),
        ("b/copied", 40 << 20),
    ]


def test_the_start_of_a_file_is_read_alone(storage: Storage) -> None:
    storage.write("a/file", b"0123456789")
    assert storage.read_start("a/file", 4) == b"0123"
    assert storage.read_start("a/file", 40) == b"0123456789"
    with pytest.raises(UserError) as absent:
        storage.read_start("a/none", 4)
    assert absent.value.reason == "NotFound"


def test_writing_again_replaces_and_changes_the_etag(storage: Storage) -> None:
    storage.write("key", b"one")
    before = storage.stat("key")
    storage.write("key", b"other")
    after = storage.stat("key")
    assert before is not None
    assert after is not None
    assert before.etag != after.etag
    assert storage.read("key") == b"other"


def test_of_two_writers_on_one_condition_one_succeeds(storage: Storage) -> None:
    assert storage.read_tagged("run/lease") is None
    assert storage.replace("run/lease", b"none to replace", expected="other") is None
    first = storage.replace("run/lease", b"one", expected=None)
    assert first is not None
    assert storage.replace("run/lease", b"other", expected=None) is None
    second = storage.replace("run/lease", b"two", expected=first)
    assert storage.replace("run/lease", b"three", expected=first) is None
    found = storage.read_tagged("run/lease")
    assert found is not None
    assert (found.data, found.tag) == (b"two", second)


def test_writers_on_one_condition_at_once(storage: Storage) -> None:
    tag = None
    for turn in range(3):
        with ThreadPoolExecutor(4) as pool:
            tags = pool.map(lambda n: storage.replace("lease", f"{turn} {n}".encode(), expected=tag), range(4))  # noqa: B023
        [tag] = [each for each in tags if each is not None]


@pytest.mark.integration
def test_a_conditional_write_whose_answer_is_lost_has_succeeded(
    bucket: str, s3_env: S3Server, new_credentials: Callable[..., None]
) -> None:
    """boto3 sends the request again, which the server then refuses."""
    with proxied(s3_env.endpoint) as proxy:
        storage = open_storage(f"{bucket}/run", field="spec.output")
        new_credentials(AWS_ENDPOINT_URL_S3=proxy.url)
        proxy.refused_after = lambda request: (503, "SlowDown") if request.writes and len(proxy.requests) == 1 else None
        tag = storage.replace("lease", b"mine", expected=None)
    assert [request.method for request in proxy.requests] == ["PUT", "PUT", "GET"]
    assert tag is not None


@pytest.mark.integration
def test_a_server_that_cannot_write_on_a_condition_says_so(
    bucket: str, s3_env: S3Server, new_credentials: Callable[..., None]
) -> None:
    with proxied(s3_env.endpoint) as proxy:
        storage = open_storage(f"{bucket}/run", field="spec.output")
        new_credentials(AWS_ENDPOINT_URL_S3=proxy.url)
        proxy.refused = lambda request: (501, "NotImplemented") if request.writes else None
        with pytest.raises(ConditionsUnsupported, match="NotImplemented"):
            storage.replace("lease", b"mine", expected=None)


LARGE = bytes(range(256)) * (40 << 12)  # 40 MiB: several parts


@pytest.mark.parametrize(
    ("content", "recorded"),
    [
        pytest.param(b"a few bytes", True, id="small"),
        pytest.param(LARGE, True, id="in parts"),
        pytest.param(LARGE, False, id="in parts, of a writer that wrote no digest down"),
    ],
)
def test_a_copys_content_is_known(storage: Storage, tmp_path: Path, content: bytes, recorded: bool) -> None:
    path, digest = tmp_path / "file", hashlib.sha256(content).hexdigest()
    path.write_bytes(content)
    storage.upload(path, "a/file", sha256=digest if recorded else None)
    storage.copy("a/file", "b/file")
    assert storage.has_content("b/file", len(content), digest, like="a/file")
    assert storage.has_content("b/file", len(content), digest)
    assert not storage.has_content("b/file", len(content) + 1, digest, like="a/file")
    assert not storage.has_content("b/file", len(content), "0" * 64, like="a/file")
    assert not storage.has_content("b/none", len(content), digest, like="a/file")
    path.write_bytes(content[::-1])
    storage.upload(path, "b/file", sha256=digest)
    assert not storage.has_content("b/file", len(content), digest, like="a/file")


@pytest.mark.integration
def test_a_server_without_checksums_is_read_back(
    bucket: str, tmp_path: Path, new_credentials: Callable[..., None]
) -> None:
    new_credentials(AWS_REQUEST_CHECKSUM_CALCULATION="when_required")
    storage = open_storage(f"{bucket}/run", field="spec.output")
    (tmp_path / "file").write_bytes(LARGE)
    digest = hashlib.sha256(LARGE).hexdigest()
    storage.upload(tmp_path / "file", "a", sha256=digest)
    storage.copy("a", "b")
    assert storage.has_content("b", len(LARGE), digest, like="a")
    assert not storage.has_content("b", len(LARGE), "0" * 64, like="a")


@pytest.mark.integration
def test_copies_go_in_parts_of_the_size_of_uploads(bucket: str, tmp_path: Path) -> None:
    """A single request copies at most 5 GB: what is larger than a part never is one."""
    storage = open_storage(f"{bucket}/run", field="spec.output")
    (tmp_path / "file").write_bytes(LARGE)
    storage.upload(tmp_path / "file", "a")
    storage.copy("a", "b")
    etags = {key: found.etag for key in ("a", "b") if (found := storage.stat(key))}
    assert etags["a"].endswith("-2")
    assert etags["b"].endswith("-2")


@pytest.mark.integration
def test_unfinished_uploads_of_a_folder_are_dropped(bucket: str, s3_env: S3Server) -> None:
    client, name = s3_env.client(), bucket.removeprefix("s3://")
    for key in ("run/artifacts/a", "run/artifacts-of-others/b", "run-2/artifacts/c"):
        client.create_multipart_upload(Bucket=name, Key=key)
    open_storage(f"{bucket}/run", field="spec.output").drop_unfinished("artifacts/")
    left = client.list_multipart_uploads(Bucket=name)["Uploads"]
    assert sorted(upload["Key"] for upload in left) == ["run-2/artifacts/c", "run/artifacts-of-others/b"]


def test_delete_takes_the_prefix_and_nothing_else(storage: Storage) -> None:
    for key in ("checkpoints/step-1/x", "checkpoints/step-1/y", "checkpoints/step-10/x", "other"):
        storage.write(key, b"x")
    storage.delete("checkpoints/step-1/")
    assert [file.key for file in storage.list()] == ["checkpoints/step-10/x", "other"]
    storage.delete("checkpoints/step-1/")


def test_a_sibling_with_the_same_beginning_is_not_listed(storage: Storage) -> None:
    sibling = open_storage(f"{storage.uri}-2", field="spec.output")
    sibling.write("key", b"x")
    storage.write("mine", b"x")
    assert [file.key for file in storage.list()] == ["mine"]


def test_absent_files(storage: Storage, tmp_path: Path) -> None:
    assert storage.stat("nothing") is None
    assert list(storage.list("nothing/")) == []
    for act in (lambda: storage.read("nothing"), lambda: storage.download("nothing", tmp_path / "x")):
        with pytest.raises(UserError) as caught:
            act()
        assert caught.value.reason == "NotFound"
        assert f"{storage.uri}/nothing" in caught.value.message
        assert caught.value.where == "spec.output"


@pytest.mark.parametrize("relative", ["../x", "a/../../x", "/etc/passwd", "a\\..\\..\\x"])
def test_paths_do_not_leave_their_root(relative: str) -> None:
    with pytest.raises(UserError, match="leaves its root"):
        inside(relative, field="data.root")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path), field="spec.output")
    storage.write("key", b"old")
    with pytest.raises(UserError):
        storage.upload(tmp_path / "absent", "key")
    assert storage.read("key") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("variables", "error", "reason", "words"),
    [
        pytest.param(
            {"AWS_SECRET_ACCESS_KEY": "not-the-key"},
            AccessDenied,
            "AccessDenied",
            ["was refused", "AWS_SECRET_ACCESS_KEY of the Secret spec.secrets.objectStorage"],
            id="wrong secret",
        ),
        pytest.param({"AWS_ACCESS_KEY_ID": "nobody"}, AccessDenied, "AccessDenied", ["was refused"], id="unknown key"),
        pytest.param(
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_EC2_METADATA_DISABLED": "true"},
            AccessDenied,
            "CredentialsMissing",
            ["name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in spec.secrets.objectStorage"],
            id="no credentials",
        ),
        pytest.param(
            {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{free_port()}"},
            Unavailable,
            "StorageUnavailable",
            ["check AWS_ENDPOINT_URL and that the server runs"],
            id="nobody listens",
        ),
        pytest.param(
            {"AWS_ENDPOINT_URL_S3": "not a url"}, Unavailable, "StorageUnavailable", ["Invalid endpoint"], id="no URL"
        ),
    ],
)
def test_what_a_user_reads_when_s3_refuses(
    bucket: str,
    new_credentials: Callable[..., None],
    variables: dict[str, str | None],
    error: type[UserError],
    reason: str,
    words: list[str],
) -> None:
    new_credentials(**variables)
    with pytest.raises(error) as caught:
        open_storage(f"{bucket}/run", field="spec.output").write("probe", b"x")
    assert caught.value.reason == reason
    assert caught.value.where == "spec.output"
    assert f"{bucket}/run/probe" in caught.value.message
    for text in words:
        assert text in caught.value.message


@pytest.mark.integration
def test_a_missing_bucket_is_named(s3_env: object) -> None:
    with pytest.raises(UserError) as caught:
        list(open_storage("s3://no-such-bucket-here/run", field="spec.output").list())
    assert caught.value.reason == "NoSuchBucket"
    assert "'no-such-bucket-here'" in caught.value.message


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(UserError, match="hf:// cannot be used here"):
        open_storage("hf://owner/name", field="data.train.x.root")


def test_a_file_is_stored_although_its_folder_is_deleted_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pod of preflight deletes the shards at its end, while another stores one."""
    storage = FolderStorage(tmp_path, field="spec.output")
    real, deleted = os.replace, []

    def replace(source: str, target: Path) -> None:
        if not deleted:
            deleted.append(storage.delete("stages/preflight/"))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    storage.write("stages/preflight/shards/x/0.json", b"x")
    assert deleted
    assert storage.read("stages/preflight/shards/x/0.json") == b"x"


def test_a_listing_leaves_out_what_is_deleted_meanwhile(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path, field="spec.output")
    for number in range(3):
        storage.write(f"stages/preflight/shards/{number}/0.json", b"x")
    listing = storage.list("stages/")
    assert next(listing).key == "stages/preflight/shards/0/0.json"
    storage.delete("stages/preflight/")
    assert list(listing) == []


def test_a_folder_that_others_write_into_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process stores a file between the deletion of the last one and that of the empty folder."""
    storage = FolderStorage(tmp_path, field="spec.output")
    storage.write("stages/preflight/shards/x/0.json", b"x")
    real = Path.rmdir

    def rmdir(folder: Path) -> None:
        (folder / "1.json").write_bytes(b"y")
        real(folder)

    monkeypatch.setattr(Path, "rmdir", rmdir)
    storage.delete("stages/preflight/shards/x/0.json")
    assert storage.read("stages/preflight/shards/x/1.json") == b"y"


def test_a_file_to_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file"):
        FolderStorage(tmp_path, field="spec.output").upload(tmp_path / "absent", "key")
