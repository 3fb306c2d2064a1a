import pytest
from internvl_trainer.train.setup import describe_length


@pytest.mark.parametrize(
    ("steps", "epochs", "max_steps", "message"),
    [
        (100, 1.0, None, "100 steps: training.epochs is 1"),
        (10, 2.5, 10, "10 steps: training.maxSteps decides, before training.epochs 2.5 is reached"),
        (7, 1.0, 10, "7 steps: training.epochs 1 decides, before training.maxSteps 10 is reached"),
    ],
)
def test_the_limit_that_decides_is_named(steps: int, epochs: float, max_steps: int | None, message: str) -> None:
    assert describe_length(steps, epochs, max_steps) == message
