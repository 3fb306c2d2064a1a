"""`python -m internvl_trainer`, and the console script `internvl-trainer`."""

from __future__ import annotations

import sys

from internvl_trainer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
