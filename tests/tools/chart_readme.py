"""Write the chart's README from its values and their schema: `python tests/tools/chart_readme.py CHART [--check]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from internvl_api.generated import generate

HEAD = """# internvl-operator

{description}. [docs/install.md](../../docs/install.md) installs it step by step,
[docs/security.md](../../docs/security.md) explains `policy`, and [docs/monitoring.md](../../docs/monitoring.md) the
metrics, alerts and dashboards.

```
helm install internvl-operator charts/internvl-operator --namespace internvl-system --create-namespace
```

Needs Kubernetes {kubernetes} or newer. Version {version}; operator and trainer {app}.

## Values

Generated from `values.yaml` and `values.schema.json`; the schema refuses unknown values.

| value | default | meaning |
|---|---|---|
"""


def rows(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, str]]:
    """(path, default, description) of each value; a value with listed properties is described by those."""
    for name, default in values.items():
        inner = schema["properties"][name]
        where = f"{path}{name}"
        listed = inner.get("properties")
        if listed and default:
            yield from rows(default, inner, f"{where}.")
        else:
            yield where, default, inner.get("description", "")


def readme(chart: Path) -> str:
    """The text of README.md."""
    about = yaml.safe_load((chart / "Chart.yaml").read_text(encoding="utf-8"))
    values = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    schema = json.loads((chart / "values.schema.json").read_text(encoding="utf-8"))
    oldest = about["kubeVersion"].removeprefix(">=").removesuffix(".0-0")
    head = HEAD.format(
        description=about["description"], kubernetes=oldest, version=about["version"], app=about["appVersion"]
    )
    lines = [f"| `{path}` | `{json.dumps(default)}` | {text} |" for path, default, text in rows(values, schema)]
    return head + "\n".join(line.replace('`""`', "") for line in lines) + "\n"


def main() -> int:
    """Write the README of each chart; with `--check` fail when one is out of date."""
    return generate(main.__doc__, lambda chart: {chart / "README.md": readme(chart)})


if __name__ == "__main__":
    sys.exit(main())
