"""serve.yaml, which is published beside a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from internvl_trainer.report.serve import inference_service
from trainer.runs import make_config

HF = {"model-hf/config.json": 1000, "model-hf/model.safetensors": 4_400_000_000, "run.yaml": 10}
UPSTREAM = {"model/config.json": 1, "model/a.safetensors": 10**11, "model/modeling_internvl_chat.py": 1}


def written(files: dict[str, int], **sections: Any) -> tuple[str, Any]:
    text = inference_service(make_config("s3://models/team/run", **sections), files)
    assert text is not None
    return text, yaml.safe_load(text)


def test_the_hf_format_is_served_without_remote_code() -> None:
    text, service = written(HF | UPSTREAM)
    assert (service["kind"], service["metadata"]["name"]) == ("InferenceService", "run")
    model = service["spec"]["predictor"]["model"]
    assert model["storageUri"] == "s3://models/team/run/artifacts/model-hf"
    assert model["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert not [argument for argument in model["args"] if "remote" in argument or "parallel" in argument]
    assert "4.4 GB" in text


def test_a_large_model_in_upstreams_format_needs_gpus_and_its_code() -> None:
    text, service = written(UPSTREAM)
    model = service["spec"]["predictor"]["model"]
    assert model["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert {"--tensor-parallel-size=2", "--trust_remote_code"} <= set(model["args"])
    assert "read them first" in text


@pytest.mark.parametrize("files", [{"adapter/adapter_config.json": 1}, {"run.yaml": 1}])
def test_an_adapter_alone_is_not_served(files: dict[str, int]) -> None:
    assert inference_service(make_config("s3://models/team/run"), files) is None


def test_kserve_reads_from_google_cloud_storage() -> None:
    text = inference_service(make_config("gs://models/team/run"), HF)
    assert "storageUri: gs://models/team/run/artifacts/model-hf" in str(text)


def test_a_model_elsewhere_has_no_address_for_kserve(tmp_path: Path) -> None:
    for output in (str(tmp_path), "az://models/team/run"):
        assert inference_service(make_config(output), HF) is None
