"""The stages of the pipeline, one module each, and what people do beside it."""

import os

# before MLflow is imported, here and in every process that is started from here: it would report each use to its makers
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
