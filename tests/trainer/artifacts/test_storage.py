"""Storage behaves the same on disk and on S3, and says what is wrong in the user's words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from internvl_trainer.artifacts.storage import AccessDenied, Storage, Unavailable, inside, open_storage
from internvl_trainer.distributed import free_port
from internvl_trainer.errors import UserError


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


def test_writing_again_replaces_and_changes_the_etag(storage: Storage) -> None:
    storage.write("key", b"one")
    before = storage.stat("key")
    storage.write("key", b"other")
    after = storage.stat("key")
    assert before is not None
    assert after is not None
    assert before.etag != after.etag
    assert storage.read("key") == b"other"


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
