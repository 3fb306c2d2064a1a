"""What is shown of an address, and which addresses are refused."""

import copy
import json
import pickle
import time
from collections.abc import Callable

import pytest
import yaml
from internvl_api.address import Address, redact
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig
from internvl_api.validation.violations import SpecError

SIGNED = "https://data.example/rows.jsonl?X-Amz-Signature=hunter22"


def run_config(annotation: str) -> RunConfig:
    data = {"train": {"x": {"annotation": annotation}}}
    spec = parse_spec({"model": {"source": "/model"}, "data": data, "output": "/out"})
    return resolve(spec, job="team/run", job_uid="uid")


@pytest.mark.parametrize(
    "show",
    [
        str,
        repr,
        json.dumps,
        "{}".format,
        lambda address: "".join(["at ", address]),
        lambda address: address + "/x",
        lambda address: "\n".join([address]),
        lambda address: str(copy.deepcopy({"a": address})),
        lambda address: str(pickle.loads(pickle.dumps(address))),
    ],
)
def test_an_address_shows_no_signature(show: Callable[[Address], str]) -> None:
    shown = show(Address(SIGNED))
    assert "hunter22" not in shown
    assert "https://data.example/rows.jsonl?" in shown


def test_the_whole_address_is_kept() -> None:
    address = Address(SIGNED)
    assert address.reveal() == Address(address).reveal() == pickle.loads(pickle.dumps(address)).reveal() == SIGNED
    assert address == SIGNED != Address("https://data.example/rows.jsonl?X-Amz-Signature=other")


def test_only_the_run_yaml_of_a_stage_has_the_whole_address() -> None:
    config = run_config(SIGNED)
    assert "hunter22" not in repr(config) + config.to_yaml() + json.dumps(config.to_dict())
    read_back = RunConfig.model_validate(yaml.safe_load(config.to_yaml(reveal=True)))
    assert read_back.data.train["x"].annotation == SIGNED
    assert isinstance(read_back.data.train["x"].annotation, Address)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://user:hunter22@db:5432/x", "postgres://db:5432/x"),
        ("mongodb+srv://user:hun/ter22@db/x?w=1 failed", "mongodb+srv://db/x?w=1 failed"),
        ("git+https://hunter22@host/x.git?a=hunter22", "git+https://host/x.git?…"),
        ("REDIS://:hunter22@cache:6379, ssh://git@host/x", "REDIS://cache:6379, ssh://git@host/x"),
        ("docker://image:tag and unix:///run/x.sock", "docker://image:tag and unix:///run/x.sock"),
        ("a" * 40 + "https://u:hunter22@host/x", "a" * 40 + "https://host/x"),
        ("HTTPS://me:pw@host/x?y", "HTTPS://host/x?…"),
        ("https://host/x;sig=abc", "https://host/x;…"),
        ("https://host/#access_token=abc", "https://host/#…"),
        ("s3://KEY:SEC/RET@bucket/key", "s3://bucket/key"),
        ("s3://bucket/a@b#c?d", "s3://bucket/a@b#c?d"),
        ("https://host/?next=https://other/&sig=abc then https://third/x", "https://host/?… then https://third/x"),
        ("hf://owner/repo@main", "hf://owner/repo@main"),
        ("found 'https://host/x?sig=abc'; check it", "found 'https://host/x?…'; check it"),
        ("https://host:8443/x", "https://host:8443/x"),
        ("no address at all", "no address at all"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize("piece", ["http://", "https://a?", "s3://a:b@", "a:", "@"])
def test_redaction_takes_linear_time(piece: str) -> None:
    """Quadratic time takes minutes for this text."""
    start = time.process_time()
    redact(piece * 100_000)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "address", ["https://me:hunter22@host/x", "https://me:hun/ter22@host/x", "s3://KEY:hunter22@bucket/x"]
)
def test_a_password_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises(SpecError) as caught:
        run_config(address)
    message = str(caught.value)
    assert message.startswith("spec.data.train.x.annotation: found a user name or a password in ")
    assert "ter22" not in message
    assert "podTemplate.env from a Secret" in message
