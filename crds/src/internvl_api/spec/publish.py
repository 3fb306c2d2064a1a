"""The sections of a spec about results: `merge` and `publish`."""

from typing import Literal

from pydantic import Field

from internvl_api.types import ApiModel

REPOSITORY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"
REVISION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"


class Merge(ApiModel):
    """Whole models to make from the trained weights."""

    formats: list[Literal["upstream", "hf"]] = Field(
        default_factory=list,
        max_length=2,
        description="upstream: loads with InternVL's own code; hf: loads with transformers alone; empty: publish the "
        "trained weights as they are, of method lora the adapter",
    )


class Hub(ApiModel):
    """A repository on the Hugging Face Hub. Needs secrets.huggingFace with a token that may write."""

    repository: str = Field(pattern=REPOSITORY_PATTERN, max_length=96, description="owner/name")
    revision: str = Field(
        "main", pattern=REVISION_PATTERN, max_length=100, description="Branch to upload to; created when it is missing"
    )
    private: bool = Field(True, description="Create the repository as private when it does not exist")


class Publish(ApiModel):
    """Where results go in addition to `output`."""

    hub: Hub | None = None
