"""DeepSpeed, imported without MLflow: its autotuner would import that too, a second at the start of each process."""

from __future__ import annotations

import sys
from typing import Any

_known: dict[str, Any] = {"mlflow": sys.modules["mlflow"]} if "mlflow" in sys.modules else {}
sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import of it fails, which DeepSpeed accepts
try:
    import deepspeed as deepspeed
finally:
    del sys.modules["mlflow"]
    sys.modules.update(_known)
