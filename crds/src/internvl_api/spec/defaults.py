"""What an administrator sets for every run of a namespace or a cluster that does not set it itself."""

import re
from typing import Annotated

import yaml
from pydantic import AfterValidator, ConfigDict, Field

from internvl_api.spec.network import Network
from internvl_api.spec.pods import PodTemplate, Scheduling, Secrets
from internvl_api.types import OUTPUT_PATTERN, ApiModel


def _prefix(value: str) -> str:
    if not re.match(OUTPUT_PATTERN, f"{value.rstrip('/')}/namespace/name"):
        raise ValueError(
            f"found {value[:80]!r}, expected s3://, gs:// or az:// with a bucket in lower case and perhaps a "
            "prefix, or an absolute path on a mounted volume"
        )
    return value.rstrip("/")


class Defaults(ApiModel):
    """Defaults of runs, in the shape of a spec. A field that a run sets wins."""

    model_config = ConfigDict(frozen=True)

    output_prefix: Annotated[str, AfterValidator(_prefix)] | None = Field(
        None, min_length=1, max_length=512, description="A run without spec.output writes to PREFIX/NAMESPACE/NAME"
    )
    secrets: Secrets = Field(default_factory=Secrets)
    scheduling: Scheduling = Field(default_factory=Scheduling)
    network: Network = Field(default_factory=Network)
    pod_template: PodTemplate = Field(default_factory=PodTemplate)

    def to_yaml(self) -> str:
        """What is set; "" when nothing is."""
        written = self.written()
        return yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=120) if written else ""

    def written(self) -> dict[str, object]:
        """What is set, as YAML has it."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)


SECTIONS = ("secrets", "scheduling", "network", "podTemplate")
