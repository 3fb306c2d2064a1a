"""Which URIs a spec may name as a source."""

import pytest
from internvl_api.recipes.resolve import parse_spec
from internvl_api.validation.violations import SpecError


def parse(root: str) -> None:
    data = {"train": {"x": {"annotation": "/rows.jsonl", "root": root}}}
    parse_spec({"model": {"source": "/model"}, "data": data, "output": "/out"})


@pytest.mark.parametrize(
    "root",
    [
        "s3://bucket/images.zip",
        "gs://my_bucket/images.zip",
        "az://container/folder/train.jsonl",
        "hf://owner/repo",
        "hf://owner/repo@v1.0/images.tar.gz",
        "hf://owner/repo@refs/pr/1",
        "hf://datasets/owner/repo@main/images",
        "https://host/images.zip?signature=x",
        "pvc://claim/images",
        "/images",
    ],
)
def test_taken(root: str) -> None:
    parse(root)


@pytest.mark.parametrize(
    "root", ["http://host/images.zip", "https://host", "hf://owner", "hf://owner/repo@", "file:///x", "ftp://x/y", "x"]
)
def test_refused_with_the_field_and_what_was_found(root: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(root)
    assert str(caught.value).startswith(f"spec.data.train.x.root: found {root!r}")
    assert "expected s3://, gs:// or az://bucket/key" in str(caught.value)
