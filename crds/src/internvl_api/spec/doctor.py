"""The section `doctor` of a spec: a check of every worker's node before GPUs are used."""

from pydantic import Field

from internvl_api.types import ApiModel

_AMOUNT = r"([1-9][0-9]{0,17}(\.[0-9]{1,18})?|0\.0{0,8}[1-9][0-9]{0,8})([kKMGT]i?)?B?"  # as parse_bytes reads it
EXPECT_PATTERN = (
    rf"^((gpus|nvlink)=[0-9]{{1,4}}|(memory|allreduce|disk|storage|free|shm)={_AMOUNT})"
    rf"(,((gpus|nvlink)=[0-9]{{1,4}}|(memory|allreduce|disk|storage|free|shm)={_AMOUNT}))*$"
)


class Doctor(ApiModel):
    """Whether a stage `doctor` checks the nodes before the first stage that uses GPUs."""

    enabled: bool = Field(False, description="Whether a run has the stage doctor")
    expect: str | None = Field(
        None,
        pattern=EXPECT_PATTERN,
        max_length=256,
        description="Lower bounds for each worker's node, as `internvl-trainer doctor --expect`: "
        "memory=80Gi,allreduce=200GB; the worker's GPUs are always expected",
    )
