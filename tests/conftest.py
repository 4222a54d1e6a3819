"""For all tests."""

from __future__ import annotations

import os
import signal

# a job in the background of a shell starts with Ctrl-C ignored, and its children would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
# tiny models gain nothing by a second thread, and lose much where the machine is busy
os.environ.setdefault("OMP_NUM_THREADS", "1")
