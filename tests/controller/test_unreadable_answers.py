"""An answer that is not JSON is one failed request; the threads that made it go on."""

from types import SimpleNamespace

import pytest
from internvl_operator.kube.client import Api, ApiError
from kubernetes import client


@pytest.mark.parametrize(
    "body",
    [b"<html>log in</html>", b"[" * 200_000, b"9" * 5000, b"[]", b"null"],
    ids=["page", "deep", "long", "list", "null"],
)
def test_an_unreadable_answer_is_an_error_of_the_server(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(client.Configuration(host="http://server.invalid"), timeout=1, connections=1)
    pool = SimpleNamespace(request=lambda *_, **__: SimpleNamespace(status=200, data=body))
    monkeypatch.setattr(api, "_pool", pool)
    with pytest.raises(ApiError, match=r"the answer to GET /version is not (a )?JSON") as caught:
        api.get("/version")
    assert caught.value.status == 0
