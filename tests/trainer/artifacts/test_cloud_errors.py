"""What a user reads when Google Cloud Storage or Azure refuses: the same reasons as with S3."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from azure.core.exceptions import ClientAuthenticationError
from google.auth.exceptions import RefreshError
from internvl_trainer.artifacts import gcs
from internvl_trainer.artifacts.azure import AzureStorage
from internvl_trainer.artifacts.gcs import GCSStorage
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.distributed import free_port
from internvl_trainer.errors import AccessDenied, Unavailable, UserError
from internvl_trainer.exit_status import redact
from ivft_cluster.azurite import Azurite

KEY = "bm90LXRoZS1rZXktYnV0LWFzLWxvbmctYXMtb25lLW9mLWEtc3RvcmFnZS1hY2NvdW50LWhhcy1pdA=="
SERVICE_ACCOUNT = {
    "type": "service_account",
    "client_email": "a@b",
    "private_key": KEY,
    "token_uri": "https://x.example",
}
NONE = dict.fromkeys(
    (
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCOUNT_NAME",
        "STORAGE_EMULATOR_HOST",
    )
)


def error_of(uri: str) -> UserError:
    with pytest.raises(UserError) as caught:
        open_storage(f"{uri}/run", field="spec.output").write("probe", b"x")
    assert caught.value.where == "spec.output"
    assert f"{uri}/run/probe" in caught.value.message
    assert KEY not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("uri", "variables", "words"),
    [
        pytest.param("az://models", {}, "AZURE_STORAGE_ACCOUNT_NAME: found ''", id="no account"),
        pytest.param("az://models", {"AZURE_STORAGE_ACCOUNT_NAME": "a/b"}, "found 'a/b'", id="not an account"),
        pytest.param(
            "az://models",
            {"AZURE_STORAGE_CONNECTION_STRING": f"Key={KEY}"},
            "is not a connection string",
            id="no string",
        ),
        pytest.param(
            "az://models",
            {"AZURE_STORAGE_ACCOUNT_NAME": "models", "AZURE_TOKEN_CREDENTIALS": "WorkloadIdentityCredential"},
            "found no key and no identity",
            id="no identity in Azure",
        ),
        pytest.param(
            "az://models",
            {
                "AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=https://models.blob.core.example",
                "AZURE_TOKEN_CREDENTIALS": "WorkloadIdentityCredential",
            },
            "found no key and no identity",
            id="an endpoint without an identity",
        ),
        pytest.param(
            "gs://models", {"NO_GCE_CHECK": "true", "HOME": "/none"}, "found no credentials", id="no identity"
        ),
        pytest.param("gs://models", {gcs.ENV_KEY: f"key {KEY}"}, "is not the JSON key", id="no JSON"),
        pytest.param("gs://models", {gcs.ENV_KEY: json.dumps(SERVICE_ACCOUNT)}, "is not the JSON key", id="no key"),
    ],
)
def test_credentials_that_are_missing_are_named(
    new_credentials: Callable[..., None], uri: str, variables: dict[str, str], words: str
) -> None:
    new_credentials(**NONE | {gcs.ENV_KEY: None, "GOOGLE_APPLICATION_CREDENTIALS": None} | variables)
    found = error_of(uri)
    assert (type(found), found.reason) == (AccessDenied, "CredentialsMissing")
    assert words in found.message
    assert "spec.secrets.objectStorage" in found.message
    assert "spec.podTemplate.serviceAccountName" in found.message


def test_credentials_that_are_refused_are_named() -> None:
    azure = AzureStorage("az://models/run", field="spec.output")._failure(
        ClientAuthenticationError("AADSTS7000215"), "key"
    )
    google = GCSStorage("gs://models/run", field="spec.output")._failure(RefreshError("expired"), "key")
    assert {azure.reason, google.reason} == {"AccessDenied"}


@pytest.mark.integration
def test_a_wrong_key_of_an_account_is_refused(
    az_container: str, azurite: Azurite, new_credentials: Callable[..., None]
) -> None:
    text = azurite.env["AZURE_STORAGE_CONNECTION_STRING"]
    new_credentials(AZURE_STORAGE_CONNECTION_STRING=text.replace(azurite.key, KEY))
    found = error_of(az_container)
    assert (type(found), found.reason) == (AccessDenied, "AccessDenied")
    assert "AZURE_STORAGE_ACCOUNT_KEY, of the Secret spec.secrets.objectStorage" in found.message


def test_a_server_that_does_not_answer_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, new_credentials: Callable[..., None]
) -> None:
    monkeypatch.setattr(gcs, "_RETRY", gcs._RETRY.with_timeout(0.1))
    new_credentials(STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{free_port()}")
    found = error_of("gs://models")
    assert (type(found), found.reason) == (Unavailable, "StorageUnavailable")
    assert "STORAGE_EMULATOR_HOST" in found.message


def test_a_missing_bucket_is_named(store: str) -> None:
    name = "no-such-bucket"
    uri = f"{store.partition('://')[0]}://{name}"
    with pytest.raises(UserError) as caught:
        list(open_storage(f"{uri}/run", field="spec.output").list())
    assert caught.value.reason == "NoSuchBucket"
    assert repr(name) in caught.value.message


def test_keys_within_a_credential_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=models;AccountKey={KEY}")
    monkeypatch.setenv(gcs.ENV_KEY, json.dumps({"private_key": f"-----BEGIN-----\n{KEY[::-1]}\n-----END-----"}))
    assert KEY not in redact(f"the key {KEY} of the account")
    assert KEY[::-1] not in redact(f"the key\n{KEY[::-1]}\n")
