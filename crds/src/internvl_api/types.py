"""Types that every part of the contract shares, and the one pydantic base class."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from internvl_api.address import HOLD, OPEN, SHOW

SOURCE_PATTERN = r"^((s3|gs|az)://[^/@:]+(/.*)?|hf://(datasets/)?[^/]+/[^/@]+(@[A-Za-z0-9._-]+)?(/.*)?|https://[^/@]+/.+|pvc://[a-z0-9.-]+(/.*)?|/.*)$"
OUTPUT_PATTERN = r"^((s3|az)://[a-z0-9][a-z0-9.-]+/.+|gs://[a-z0-9][a-z0-9._-]+/.+|/.+)$"
"""Addresses that a run writes to."""

Source = Annotated[
    str,
    Field(
        pattern=SOURCE_PATTERN,
        max_length=2048,
        description="Address to read from: s3://bucket/key, gs://bucket/key, az://container/key, "
        "hf://owner/repo@revision, https://, pvc:// or a path",
    ),
    HOLD,
    OPEN,
    SHOW,
]
DataFormat = Literal["auto", "chat", "sharegpt", "messages", "query-response", "coco", "flickr", "vqav2"]
Template = Literal["Hermes-2", "internlm2-chat", "phi3-chat", "internvl2_5"]


class ApiModel(BaseModel):
    """Base class of everything that a user or a stage reads as YAML: camelCase outside, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        validate_default=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    def to_dict(self) -> dict[str, object]:
        """The camelCase JSON-ready dict; None fields are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
