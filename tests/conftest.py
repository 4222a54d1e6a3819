"""For all tests: a job in the background of a shell starts with Ctrl-C ignored, and its children would inherit that."""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
