"""Rules for mixing settings that contradict each other or have no effect."""

from internvl_api.spec import Data, Dataset
from internvl_api.validation.cel_rules import Values, rule

_WEIGHTED = "has(self.train) && self.train.exists(name, has(self.train[name].weight))"


def _weighted(data: Data) -> int:
    """Number of training datasets with a weight."""
    return sum(dataset.weight is not None for dataset in data.train.values())


@rule(
    "data",
    f"!({_WEIGHTED}) || self.train.all(name, has(self.train[name].weight))",
    "some datasets have a weight and others have none; give every dataset a weight, or none",
    field="train",
)
def every_weight(data: Data) -> Values | None:
    """All training datasets have a weight, or none has one."""
    return {} if 0 < _weighted(data) < len(data.train) else None


@rule(
    "data",
    f"!has(self.mixingTemperature) || !({_WEIGHTED})",
    "datasets of train have weights, which mixingTemperature would replace; remove it or the weights",
    field="mixingTemperature",
)
def weights_or_temperature(data: Data) -> Values | None:
    """Datasets are drawn by weights or by a temperature, not by both."""
    return {} if data.mixing_temperature is not None and _weighted(data) else None


@rule(
    "data",
    f"!has(self.meta) || !({_WEIGHTED})",
    "datasets of train have weights, and those of a meta JSON have none; list them in train, or remove the weights",
    field="meta",
)
def weights_without_meta(data: Data) -> Values | None:
    """Weights need every dataset in the spec."""
    return {} if data.meta is not None and _weighted(data) else None


@rule(
    "data",
    "!has(self.mixingTemperature) || has(self.meta) || !has(self.train) || self.train.size() != 1",
    "mixingTemperature has no effect on a single dataset; remove it, or add datasets",
    field="mixingTemperature",
)
def temperature_mixes(data: Data) -> Values | None:
    """A temperature has several datasets to draw from."""
    return {} if data.mixing_temperature is not None and data.meta is None and len(data.train) == 1 else None


@rule(
    "data.validation[]",
    "!has(self.weight)",
    "weight has no effect on a held-out dataset, of which every row is measured; remove it",
    field="weight",
)
def validation_has_no_weight(dataset: Dataset) -> Values | None:
    """Held-out datasets are not mixed."""
    return {} if dataset.weight is not None else None


RULES = (every_weight, weights_or_temperature, weights_without_meta, temperature_mixes, validation_has_no_weight)
