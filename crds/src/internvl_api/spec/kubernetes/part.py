"""What all parts share: unknown fields are refused, and names and quantities have bounds."""

import re
from typing import Annotated

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, with_config

from internvl_api.quantity import amount

part = with_config(ConfigDict(extra="forbid"))

QUANTITY_PATTERN = r"^[+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?$"
_QUANTITY_LENGTH = 64
_LIMIT = 2**63  # Kubernetes' own


def _quantity(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    is_text = isinstance(value, str) and len(value) <= _QUANTITY_LENGTH and re.match(QUANTITY_PATTERN, value)
    if (is_number or is_text) and 0 <= amount(value) < _LIMIT:
        return value
    raise ValueError(f"found {str(value)[:80]!r}, expected a quantity from 0 to below 8Ei, such as 8, 500m or 64Gi")


# Schemas of Kubernetes allow a whole number or text here, and no fraction: 0.5 is written 500m or "0.5".
Quantity = Annotated[
    int | str,
    PlainValidator(_quantity),
    WithJsonSchema(
        {"x-kubernetes-int-or-string": True, "pattern": QUANTITY_PATTERN, "maxLength": _QUANTITY_LENGTH},
    ),
]
Quantities = Annotated[dict[str, Quantity], Field(max_length=50)]

Name = Annotated[str, Field(min_length=1, max_length=253)]  # of an object, a DNS subdomain
Key = Annotated[str, Field(min_length=1, max_length=253)]  # of a ConfigMap or a Secret
QualifiedName = Annotated[str, Field(min_length=1, max_length=317)]  # prefix/name, as keys of labels are
LabelValue = Annotated[str, Field(max_length=63)]
Path = Annotated[str, Field(min_length=1, max_length=4096)]
