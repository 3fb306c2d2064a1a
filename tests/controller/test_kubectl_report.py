"""`kubectl ivft report --out` downloads from S3; for the other stores it names their own tool's command."""

from pathlib import Path

import pytest
from internvl_operator.kubectl_ivft.client import UserError
from internvl_operator.kubectl_ivft.report import download


@pytest.mark.parametrize(
    ("uri", "step"),
    [
        pytest.param("gs://m/a b/index.html", "run `gcloud storage cp 'gs://m/a b/index.html' out.html`", id="google"),
        pytest.param(
            "az://m/run/index.html",
            "run `az storage blob download --container-name m --name run/index.html --file out.html`",
            id="azure",
        ),
        pytest.param("/pvc/m/index.html", "copy it from there", id="a volume"),
    ],
)
def test_what_cannot_be_downloaded_is_told_with_the_next_step(uri: str, step: str) -> None:
    with pytest.raises(UserError) as caught:
        download(uri, Path("out.html"))
    assert f"the report is at {uri}; {step}" in str(caught.value)
