"""Files over https://, from a server of the tests that breaks connections, refuses and redirects."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
from internvl_trainer.artifacts import https, sources
from internvl_trainer.artifacts.checked_connection import ENV_ALLOW_PRIVATE
from internvl_trainer.artifacts.download_progress import told_to
from internvl_trainer.errors import AccessDenied, Unavailable, UserError
from ivft_cluster.pki import Authority
from trainer.artifacts.web_server import WebServer, serving

pytestmark = pytest.mark.slow

ROWS = bytes(range(256)) * 20_000  # 5 MB: several chunks
FIELD = "spec.data.train.coco.annotation"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(ENV_ALLOW_PRIVATE, "true")
    for cached in (sources._cache, sources._open, https._pool):
        cached.cache_clear()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls") / "pki"
    Authority.create(folder).issue("server", "server", hosts=["127.0.0.1"])
    return folder


@pytest.fixture
def server(authority: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.crt"))
    made = WebServer()
    made.files["/data/rows.jsonl"] = ROWS
    with serving(made, authority / "server.crt"):
        yield made


def fetch(server: WebServer, path: str = "/data/rows.jsonl") -> Path:
    return sources.fetch_file(server.url + path, field=FIELD)


def test_a_file_is_downloaded_once(server: WebServer) -> None:
    assert fetch(server).read_bytes() == ROWS
    assert fetch(server).read_bytes() == ROWS
    assert len(server.downloads()) == 1


def test_the_start_of_a_file_is_read_alone(server: WebServer) -> None:
    assert sources.read_start(f"{server.url}/data", "rows.jsonl", 300, field=FIELD) == ROWS[:300]
    assert [request.range for request in server.downloads()] == ["bytes=0-299"]
    server.files["/data/short"] = b"abc"
    assert sources.read_start(f"{server.url}/data", "short", 300, field=FIELD) == b"abc"
    with pytest.raises(UserError) as absent:
        sources.read_start(f"{server.url}/data", "none", 300, field=FIELD)
    assert absent.value.reason == "NotFound"


def test_a_changed_file_is_another_entry(server: WebServer) -> None:
    before = fetch(server)
    server.files["/data/rows.jsonl"] = b"changed"
    assert fetch(server).read_bytes() == b"changed"
    assert before.read_bytes() == ROWS


def test_a_broken_connection_is_gone_on_with_where_it_broke(server: WebServer) -> None:
    chunk = https._CHUNK
    server.cuts["/data/rows.jsonl"] = [40 * chunk, 10 * chunk + 1]
    assert fetch(server).read_bytes() == ROWS
    ranges = [request.range for request in server.downloads()]
    assert ranges == [None, f"bytes={40 * chunk}-", f"bytes={50 * chunk}-"]


def test_a_file_that_changes_after_a_break_is_not_patched_together(server: WebServer, tmp_path: Path) -> None:
    source = https.HttpsSource(f"{server.url}/data/rows.jsonl", field=FIELD)
    (tmp_path / "half").write_bytes(ROWS[:1000])
    old = source.stat()
    assert old is not None
    server.files["/data/rows.jsonl"] = ROWS[::-1]
    with pytest.raises(Unavailable, match="changed while it was read; try again"):
        source._append(old, tmp_path / "half")
    assert (tmp_path / "half").read_bytes() == ROWS[:1000]


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        pytest.param(
            401, AccessDenied, "was refused (401); use a public URL, a signed URL or an object store", id="401"
        ),
        pytest.param(
            403, AccessDenied, "was refused (403); use a public URL, a signed URL or an object store", id="403"
        ),
        pytest.param(405, Unavailable, "the server answered 405", id="405"),
    ],
)
def test_a_refusal_names_field_and_url_without_its_signature(
    server: WebServer, status: int, kind: type[UserError], message: str
) -> None:
    server.refused["/data/rows.jsonl"] = status
    with pytest.raises(kind) as caught:
        fetch(server, "/data/rows.jsonl?signature=secret")
    place = f"{server.url}/data/rows.jsonl"
    assert str(caught.value) in (f"{FIELD}: {place} {message}", f"{FIELD}: {place}: {message}")


def test_an_absent_file_names_field_and_url(server: WebServer) -> None:
    with pytest.raises(UserError) as caught:
        fetch(server, "/data/none.jsonl?signature=secret")
    assert str(caught.value) == f"{FIELD}: found no object {server.url}/data/none.jsonl; check the URI"


def test_a_redirect_to_plain_http_is_refused(server: WebServer, tmp_path: Path) -> None:
    plain = WebServer()
    plain.files["/rows.jsonl"] = ROWS
    with serving(plain):
        server.redirects["/data/rows.jsonl"] = f"{plain.url}/rows.jsonl".replace("http", "HTTP", 1)
        with pytest.raises(UserError, match="redirects away from https://"):
            fetch(server)
    assert plain.requests == []


def test_a_redirect_to_a_refused_address_is_not_followed(server: WebServer) -> None:
    server.redirects["/data/rows.jsonl"] = "https://169.254.169.254/latest/meta-data"
    with pytest.raises(UserError, match=r"rows\.jsonl: 169\.254\.169\.254 is a link-local address"):
        fetch(server)


def test_redirects_without_end_are_refused(server: WebServer) -> None:
    server.redirects["/data/rows.jsonl"] = "/data/rows.jsonl"
    with pytest.raises(UserError, match="redirects more than 5 times"):
        fetch(server)


def test_a_redirect_is_followed(server: WebServer) -> None:
    server.redirects["/data/new.jsonl"] = "rows.jsonl?signature=secret"
    assert fetch(server, "/data/new.jsonl").read_bytes() == ROWS


def test_a_signature_comes_from_the_environment(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"set SOURCE_QUERY in podTemplate\.env from a Secret"):
        fetch(server, "/data/rows.jsonl?$(SOURCE_QUERY)")
    sources._open.cache_clear()
    monkeypatch.setenv("SOURCE_QUERY", "signature=secret")
    assert fetch(server, "/data/rows.jsonl?$(SOURCE_QUERY)").read_bytes() == ROWS
    assert server.queries[-1] == "signature=secret"


def test_a_private_address_is_refused_before_a_request(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_ALLOW_PRIVATE)
    with pytest.raises(UserError, match=r"127\.0\.0\.1 is a loopback address"):
        fetch(server)
    assert server.requests == []


def test_an_unknown_authority_is_said_so(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setattr(https, "_pool", lambda _: https.urllib3.PoolManager(retries=False))
    with pytest.raises(Unavailable, match="a private authority's certificate goes into SSL_CERT_FILE"):
        fetch(server)


def test_a_checkpoint_is_found_by_its_usual_names(server: WebServer) -> None:
    files = {
        "config.json": b"{}",
        "tokenizer.model": b"t",
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode(),
        "model-1.safetensors": b"weights",
        "pytorch_model.bin": b"pickle",
    }
    server.files |= {f"/model/{name}": content for name, content in files.items()}
    uri = f"{server.url}/model"
    folder = sources.fetch_directory(uri, field="spec.model.source")
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {name: content for name, content in files.items() if name != "pytorch_model.bin"}
    assert list(sources.list_sizes(uri, field="spec.model.source")) == [
        "config.json",
        "tokenizer.model",
        "model.safetensors.index.json",
        "model-1.safetensors",
    ]


def test_media_are_asked_for_once(server: WebServer) -> None:
    server.files["/images/a b.jpg"] = b"picture"
    for _ in range(2):
        assert sources.open_media(f"{server.url}/images", "a b.jpg") == b"picture"
    assert len(server.downloads()) == 1
    with pytest.raises(FileNotFoundError):
        sources.open_media(f"{server.url}/images", "none.jpg")


def test_a_download_says_how_far_it_is(server: WebServer) -> None:
    heard: list[str | None] = []
    with told_to(heard.append):
        fetch(server)
    assert heard.pop() is None, "it has ended"
    assert heard[0] is not None
    assert heard[0].startswith(f"downloading {server.url}/data/rows.jsonl: ")
    assert heard[0].endswith(" of 5.1 MB")


def _fetch_in_process(url: str, results: multiprocessing.Queue[bytes]) -> None:
    sources._cache.cache_clear()
    results.put(sources.fetch_file(url, field=FIELD).read_bytes())


def test_the_pods_of_a_node_download_once_together(server: WebServer) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    url = f"{server.url}/data/rows.jsonl"
    processes = [context.Process(target=_fetch_in_process, args=(url, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert all(results.get(timeout=120) == ROWS for _ in processes)
    for process in processes:
        process.join()
    assert len(server.downloads()) == 1


def test_a_killed_download_leaves_nothing_that_is_trusted(server: WebServer, tmp_path: Path) -> None:
    server.cuts["/data/rows.jsonl"] = [1_000_000] * 100
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_fetch_in_process, args=(f"{server.url}/data/rows.jsonl", results))
    process.start()
    while not server.downloads() and process.is_alive():
        process.join(0.02)
    process.kill()
    process.join()
    assert list((tmp_path / "cache" / "entries").iterdir()) == []
    server.cuts.clear()
    assert fetch(server).read_bytes() == ROWS
