"""The one exception that a wrong spec raises."""


class SpecError(ValueError):
    """The spec cannot be run. `field` is the path a user would edit, `message` says found, expected, next step."""

    def __init__(self, reason: str, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.reason, self.field, self.message = reason, field, message
