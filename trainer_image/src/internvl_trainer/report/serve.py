"""serve.yaml: a KServe InferenceService for a published model, to look over and apply."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.output_layout import ARTIFACTS, MODEL_FOLDERS

_STORES = ("s3://", "gs://")  # KServe names a blob of Azure by an address with the account, which an output has not
_GPU_BYTES = 80 << 30
_WEIGHTS_SHARE = 0.6  # of a GPU's memory; the rest is for the cache of keys and values
_GPUS = (1, 2, 4, 8)
_NAME_LIMIT = 45  # KServe makes names of Services from it
_HEAD = """\
# A KServe InferenceService for this model (docs/guides/serving.md). Look over before `kubectl apply -f serve.yaml`:
# - serviceAccountName: one whose Secret may read {uri}
# - GPUs: {gpus} of 80 GiB hold the weights ({size:.1f} GB); change both numbers together
{remote}"""
_REMOTE = "# - trust_remote_code runs the *.py beside the weights, which are those of the base model; read them first\n"


def inference_service(config: RunConfig, files: Mapping[str, int]) -> str | None:
    """The text of serve.yaml; None where there is no whole chat model in S3 or Google Cloud Storage.

    Args:
        files: sizes of the published files by their path below artifacts/.
    """
    folder = next((MODEL_FOLDERS[name] for name in ("hf", "upstream") if _is_whole(files, MODEL_FOLDERS[name])), None)
    if folder is None or config.model.kind != "chat" or not config.output.startswith(_STORES):
        return None
    size = sum(each for path, each in files.items() if path.startswith(folder) and path.endswith(".safetensors"))
    gpus = next((count for count in _GPUS if size <= count * _GPU_BYTES * _WEIGHTS_SHARE), _GPUS[-1])
    has_code = any(path.startswith(folder) and path.endswith(".py") for path in files)
    name = _service_name(config.job.rpartition("/")[2])
    uri = f"{config.output.rstrip('/')}/{ARTIFACTS}/{folder.rstrip('/')}"
    arguments = [f"--model_name={name}", "--model_dir=/mnt/models", f"--max_model_len={config.training.max_seq_length}"]
    arguments += [f"--tensor-parallel-size={gpus}"] if gpus > 1 else []
    arguments += ["--trust_remote_code"] if has_code else []
    head = _HEAD.format(uri=uri, gpus=gpus, size=size / 1e9, remote=_REMOTE if has_code else "")
    return head + yaml.safe_dump(_service(name, uri, arguments, gpus), sort_keys=False)


def _service(name: str, uri: str, arguments: list[str], gpus: int) -> dict[str, Any]:
    gpu = {"nvidia.com/gpu": str(gpus)}
    model = {
        "modelFormat": {"name": "huggingface"},
        "storageUri": uri,
        "args": arguments,
        "resources": {"requests": gpu | {"cpu": "4", "memory": "32Gi"}, "limits": gpu},
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {"predictor": {"serviceAccountName": "model-reader", "model": model}},
    }


def _is_whole(files: Mapping[str, int], folder: str) -> bool:
    return f"{folder}config.json" in files


def _service_name(run: str) -> str:
    """The run's name as a DNS label."""
    label = re.sub(r"[^a-z0-9-]+", "-", run.lower())[:_NAME_LIMIT].strip("-")
    return label if label[:1].isalpha() else f"model-{label}".rstrip("-")
