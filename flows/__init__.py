"""When and how the pipeline runs, under Prefect."""

import os

# before Prefect is imported: it would report each use to its makers, and say so at every start
os.environ.setdefault("DO_NOT_TRACK", "1")
