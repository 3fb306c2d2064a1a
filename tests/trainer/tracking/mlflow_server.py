"""A real MLflow server, of the packages that the client brings and a few more. Usage: mlflow_server.py DATABASE PORT"""

from __future__ import annotations

import os
import sys

os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # jobs need pandas, and no run of ours has any
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{sys.argv[1]}"
os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = f"{sys.argv[1]}-artifacts"

from mlflow.server import app
from werkzeug.serving import make_server

make_server("127.0.0.1", int(sys.argv[2]), app, threaded=True).serve_forever()
