"""hf:// against a stand-in of the Hub's API (see web_server.py); the client is huggingface_hub itself."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainer.artifacts.web_server import COMMIT, HubStandIn, serving

pytestmark = pytest.mark.slow

URI = "hf://team/tiny@main"
WEIGHTS = bytes(range(256)) * 8000  # 2 MB
DENIED = (
    "not found, or not open to this token; check the name, accept the model's terms on the Hub, and put a token into "
    "the Secret spec.secrets.huggingFace (key HF_TOKEN)"
)

# huggingface_hub reads its settings when it is imported, as it does in a pod: each use is a process of its own.
_CLIENT = """
import json, sys
from internvl_trainer.artifacts import sources
from internvl_trainer.errors import UserError
def describe(uri):
    return sources.describe_directory(uri, lambda name: name.endswith(".safetensors"), field="spec.model.source")
try:
    name, arguments = json.loads(sys.argv[1])
    found = getattr(sys.modules[__name__], name, None) or getattr(sources, name)
    found = found(*arguments["positional"], **arguments["named"])
    print(json.dumps({"found": found.decode("latin-1") if isinstance(found, bytes) else str(found)}))
except FileNotFoundError as error:
    print(json.dumps({"absent": str(error)}))
except UserError as error:
    print(json.dumps({"kind": type(error).__name__, "reason": error.reason, "message": str(error)}))
"""


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    made = HubStandIn()
    made.files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"pickle"}
    with serving(made):
        yield made


class Client:
    """Calls a function of `sources` in a new process."""

    def __init__(self, hub: HubStandIn, folder: Path) -> None:
        self._env = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hf"),
            "INTERNVL_CACHE": str(folder / "cache"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        self._env.pop("HF_TOKEN", None)

    def __call__(
        self, function: str, *positional: str | int, token: str | None = None, **named: object
    ) -> dict[str, str]:
        call = json.dumps([function, {"positional": positional, "named": named}])
        env = self._env if token is None else {**self._env, "HF_TOKEN": token}
        done = subprocess.run([sys.executable, "-c", _CLIENT, call], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def model(self, uri: str = URI, **options: object) -> dict[str, str]:
        """fetch_directory of a checkpoint."""
        token = options.pop("token", None)
        return self("fetch_directory", uri, token=token, field="spec.model.source", **options)  # type: ignore[arg-type]

    def describe(self, uri: str) -> str:
        """describe_directory of a checkpoint's deciding files."""
        return self("describe", uri)["found"]


@pytest.fixture
def client(hub: HubStandIn, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


def test_a_repository_comes_without_pickles_and_only_once(hub: HubStandIn, client: Client) -> None:
    folder = Path(client.model()["found"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
    }
    asked = len(hub.requests)
    assert client.model()["found"] == str(folder)
    assert [request.path for request in hub.requests[asked:]] == [
        "/api/models/team/tiny/revision/main",
        f"/api/models/team/tiny/tree/{COMMIT}",
    ]


def test_the_start_of_a_file_is_read_alone(hub: HubStandIn, client: Client) -> None:
    arguments = (URI, "model.safetensors", 100)
    assert client("read_start", *arguments, field="spec.model.source")["found"] == WEIGHTS[:100].decode("latin-1")
    assert [request.range for request in hub.requests if "resolve" in request.path] == ["bytes=0-99"]
    hub.token = "hf_secret"
    assert client("read_start", *arguments, field="spec.model.source")["reason"] == "AccessDenied"
    assert "found" in client("read_start", *arguments, field="spec.model.source", token=hub.token)


def test_a_commit_that_is_cached_costs_the_list_of_its_digests(hub: HubStandIn, client: Client) -> None:
    folder = client.model(f"hf://team/tiny@{COMMIT}")["found"]
    asked = len(hub.requests)
    assert client.model(f"hf://team/tiny@{COMMIT}")["found"] == folder
    assert [request.path for request in hub.requests[asked:]] == [f"/api/models/team/tiny/tree/{COMMIT}"]


def test_code_planted_in_the_cache_is_replaced(hub: HubStandIn, client: Client, tmp_path: Path) -> None:
    """Also when the planter wrote the record of its digests."""
    folder = Path(client.model()["found"])
    (folder / "modeling_internvl_chat.py").write_text("import os")
    (record,) = (folder.parent.parent / "records").iterdir()
    digests = json.loads(record.read_text())
    digests["modeling_internvl_chat.py"] = hashlib.sha256(b"import os").hexdigest()
    record.write_text(json.dumps(digests))
    assert Path(client.model()["found"]) == folder
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


CODE = {"modeling_internvl_chat.py": b"import torch", "config.json": b"{}"}


def test_code_comes_from_a_pinned_commit_only(hub: HubStandIn, client: Client) -> None:
    hub.files |= CODE
    branch, commit = (Path(client.model(uri)["found"]) for uri in (URI, f"hf://team/tiny@{COMMIT}"))
    assert {path.name for path in branch.iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in commit.iterdir()} == {"config.json", "model.safetensors", *CODE}
    assert not [request for request in hub.requests if request.path.startswith("/team/tiny/resolve/main")]
    assert client("commit_to_pin", URI, field="f")["found"] == COMMIT
    assert client("commit_to_pin", f"hf://team/tiny@{COMMIT}", field="f")["found"] == "None"
    del hub.files["modeling_internvl_chat.py"]
    assert client("commit_to_pin", URI, field="f")["found"] == "None", "there is no code to leave out"


def test_code_of_the_right_digest_planted_beside_a_branch_is_removed(hub: HubStandIn, client: Client) -> None:
    hub.files |= CODE
    folder = Path(client.model()["found"])
    planted = folder / "modeling_internvl_chat.py"
    planted.write_bytes(CODE[planted.name])
    (record,) = (folder.parent.parent / "records").iterdir()
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    record.write_text(json.dumps(digests))
    client.model()
    assert not planted.exists()


def test_preflight_takes_no_weights(hub: HubStandIn, client: Client) -> None:
    folder = Path(client.model(weights=False)["found"])
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not [request for request in hub.requests if request.path.endswith("model.safetensors")]


def test_a_broken_connection_is_gone_on_with(hub: HubStandIn, client: Client) -> None:
    hub.files["model.safetensors"] = WEIGHTS * 12  # the client keeps what has come in pieces of 10 MB
    hub.cuts["model.safetensors"] = [22_000_000]
    folder = Path(client.model()["found"])
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS * 12
    asked = [
        request for request in hub.requests if request.method == "GET" and request.path.endswith("model.safetensors")
    ]
    assert asked[0].range is None
    assert asked[1].range is not None
    assert int(asked[1].range.removeprefix("bytes=").rstrip("-")) >= 10_000_000


@pytest.mark.parametrize(
    "name", [pytest.param("model.safetensors", id="sha256"), pytest.param("config.json", id="git")]
)
def test_other_bytes_than_the_hubs_digest_are_refused_and_fetched_again(
    hub: HubStandIn, client: Client, name: str
) -> None:
    hub.files["config.json"] = b'{"a": 1}'
    hub.corrupt = {name}
    answer = client.model()
    assert (answer["kind"], answer["reason"]) == ("Unavailable", "DownloadCorrupt")
    assert answer["message"].startswith(f"spec.model.source: {URI}: {name} has digest ")
    assert answer["message"].endswith("; try again")
    hub.corrupt = set()
    assert (Path(client.model()["found"]) / name).read_bytes() == hub.files[name]


def test_what_a_failed_attempt_brought_is_not_fetched_again(hub: HubStandIn, client: Client) -> None:
    hub.corrupt = {"config.json"}
    hub.files["config.json"] = b'{"a": 1}'
    client.model()
    hub.corrupt = set()
    client.model()
    whole = [
        request for request in hub.requests if request.method == "GET" and request.path.endswith("model.safetensors")
    ]
    assert len(whole) == 1


@pytest.mark.parametrize(
    ("uri", "token", "kind", "message"),
    [
        pytest.param(URI, None, "AccessDenied", f"{URI}: {DENIED}", id="no token"),
        pytest.param(URI, "hf_wrong", "AccessDenied", f"{URI}: {DENIED}", id="another token"),
        pytest.param(
            "hf://team/none", "hf_right", "AccessDenied", f"hf://team/none: {DENIED}", id="no such repository"
        ),
        pytest.param(
            "hf://team/tiny@v9",
            "hf_right",
            "UserError",
            "hf://team/tiny@v9: no revision 'v9' in that repository",
            id="no such revision",
        ),
        pytest.param(
            "hf://team",
            "hf_right",
            "UserError",
            "found 'hf://team', expected hf://owner/repository@revision",
            id="no repository",
        ),
    ],
)
def test_what_the_hub_refuses(
    hub: HubStandIn, client: Client, uri: str, token: str | None, kind: str, message: str
) -> None:
    hub.token = "hf_right"
    answer = client.model(uri, token=token)
    assert (answer["kind"], answer["message"]) == (kind, f"spec.model.source: {message}")


def test_the_token_opens_a_gated_repository(hub: HubStandIn, client: Client) -> None:
    hub.token = "hf_right"
    assert "found" in client.model(token="hf_right")


def test_a_hub_that_is_down_is_unavailable(client: Client) -> None:
    client._env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    answer = client.model()
    assert (answer["kind"], answer["reason"]) == ("Unavailable", "HubUnavailable")


def test_files_and_media_of_a_dataset(hub: HubStandIn, client: Client) -> None:
    hub.files |= {"rows.jsonl": b"{}\n", "images/a.jpg": b"picture"}
    found = client("fetch_file", "hf://datasets/team/tiny@main/rows.jsonl", field="data.x.annotation")["found"]
    assert Path(found).read_bytes() == b"{}\n"
    root = "hf://datasets/team/tiny@main/images"
    assert client("open_media", root, "a.jpg") == {"found": "picture"}
    assert client("open_media", root, "none.jpg") == {"absent": "none.jpg"}


def test_a_branch_is_told_by_the_digests_of_its_files_and_a_commit_by_itself(hub: HubStandIn, client: Client) -> None:
    before = client.describe(URI)
    hub.files["README.md"] = b"a better model card"
    assert client.describe(URI) == before
    hub.files["model.safetensors"] = WEIGHTS[::-1]
    assert client.describe(URI) != before
    hub.files.clear()
    assert client.describe(f"hf://team/tiny@{COMMIT}") == str({"commit": COMMIT})
