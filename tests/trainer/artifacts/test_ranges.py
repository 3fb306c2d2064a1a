"""Parts of remote files: the bytes that were asked for, of the version that was listed, or an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from internvl_trainer.artifacts import https, ranges
from internvl_trainer.artifacts.checked_connection import ENV_ALLOW_PRIVATE
from internvl_trainer.artifacts.hub import HubFiles, repository
from internvl_trainer.artifacts.range_sources import open_ranges
from internvl_trainer.artifacts.ranges import RangesUnsupported, RemoteFile, SourceChanged
from internvl_trainer.artifacts.storage import StoredFile, open_storage
from internvl_trainer.errors import AccessDenied, Unavailable
from ivft_cluster.pki import Authority
from tenacity import wait_none
from trainer.artifacts.conftest import forget_client
from trainer.artifacts.web_server import COMMIT, HubStandIn, S3StandIn, WebServer, serving

NAME = "model.safetensors"
DATA = bytes(range(256)) * 400
FIELD = "spec.model.source"
Opened = tuple[WebServer, str, RemoteFile]


@pytest.fixture(autouse=True)
def _small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several requests for a range, and no waits between attempts."""
    monkeypatch.setattr(ranges, "_CHUNK", 30_000)
    monkeypatch.setattr(ranges, "wait_exponential", lambda *_, **__: wait_none())


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.create(tmp_path_factory.mktemp("ranges") / "pki")
    made.issue("server", "server", hosts=["127.0.0.1"])
    return made


@pytest.fixture(params=["s3", "https", "hub"])
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """A server, the path of its file there, and the file as a client sees it."""
    kind = request.param
    server: WebServer = {"s3": S3StandIn, "https": WebServer, "hub": HubStandIn}[kind]()
    path = {"s3": f"/models/base/{NAME}", "https": f"/base/{NAME}", "hub": NAME}[kind]
    server.files[path] = DATA
    certificate = None
    if kind == "https":
        certificate = request.getfixturevalue("authority").folder / "server.crt"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("ca.crt")))
        monkeypatch.setenv(ENV_ALLOW_PRIVATE, "true")
        https._pool.cache_clear()
    with serving(server, certificate):
        if isinstance(server, HubStandIn):
            monkeypatch.setenv("HF_ENDPOINT", server.url)
            monkeypatch.delenv("HF_TOKEN", raising=False)
            source: ranges.RangeSource | None = HubFiles(repository("hf://team/tiny", field=FIELD), COMMIT)
            file = StoredFile(NAME, len(DATA), "its digest")
        else:
            for name, value in server.environment().items() if isinstance(server, S3StandIn) else ():
                monkeypatch.setenv(name, value)
            forget_client()
            source = open_ranges("s3://models/base" if kind == "s3" else f"{server.url}/base", field=FIELD)
            assert source is not None
            (file,) = (each for each in source.list() if each.key == NAME)
        assert source is not None
        server.requests.clear()
        yield server, path, RemoteFile(source, file)
    forget_client()


def ranges_of(server: WebServer) -> list[str | None]:
    return [request.range for request in server.requests]


def test_only_the_range_is_asked_for_in_bounded_requests(opened: Opened) -> None:
    server, _, file = opened
    assert file.read(100, 70_100) == DATA[100:70_100]
    assert ranges_of(server) == ["bytes=100-30099", "bytes=30100-60099", "bytes=60100-70099"]


def test_an_answer_that_is_cut_short_is_asked_for_again(opened: Opened) -> None:
    server, path, file = opened
    server.cuts[path] = [10, 0]
    assert file.read(5, 1005) == DATA[5:1005]
    assert ranges_of(server) == ["bytes=5-1004"] * 3


def test_a_server_that_stays_short_is_unavailable(opened: Opened) -> None:
    server, path, file = opened
    server.cuts[path] = [10] * 100
    with pytest.raises(Unavailable):
        file.read(5, 1005)
    assert len(server.requests) <= 40


def test_a_server_without_ranges_is_told_apart_before_its_answer_is_read(opened: Opened) -> None:
    server, _, file = opened
    server.ignores_ranges = True
    with pytest.raises(RangesUnsupported, match=f"{NAME}: asked for bytes 5-1004/{len(DATA)}, the server answers 200"):
        file.read(5, 1005)
    assert len(server.requests) == 1


def test_a_file_that_changed_since_it_was_listed_is_not_mixed(opened: Opened) -> None:
    server, path, file = opened
    server.files[path] = DATA[::-1]
    if isinstance(server, HubStandIn):  # a commit never changes
        return
    with pytest.raises(SourceChanged, match=f"{NAME} changed while it was read; try again"):
        file.read(5, 1005)
    assert len(server.requests) == 1


def test_credentials_that_are_refused_are_named(opened: Opened) -> None:
    server, path, file = opened
    server.refused[path] = 403
    if isinstance(server, HubStandIn):
        server.token = "hf_secret"
    with pytest.raises(AccessDenied):
        file.read(0, 10)


def test_a_file_without_a_strong_etag_is_not_read_in_parts(authority: Authority) -> None:
    source = https.HttpsSource("https://127.0.0.1/base", field=FIELD)
    with pytest.raises(RangesUnsupported, match="no strong ETag"):
        source.read_range(StoredFile(NAME, 100, 'W/"weak"'), 0, 10)


def test_a_folder_is_read_in_place() -> None:
    assert open_ranges("/models/base", field=FIELD) is None
    assert open_ranges("pvc://models/base", field=FIELD) is None


def test_an_object_store_gives_ranges_of_one_version(store: str) -> None:
    storage, source = open_storage(f"{store}/base", field=FIELD), open_ranges(f"{store}/base", field=FIELD)
    assert source is not None
    storage.write(NAME, DATA)
    (file,) = source.list()
    assert RemoteFile(source, file).read(1000, 70_000) == DATA[1000:70_000]
    storage.write(NAME, DATA[::-1])
    with pytest.raises(SourceChanged):
        RemoteFile(source, file).read(1000, 2000)
