"""For all tests."""

from __future__ import annotations

import os
import signal

import pytest

# a job in the background of a shell starts with Ctrl-C ignored, and its children would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
# tiny models gain nothing by a second thread, and lose much where the machine is busy
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST_FIRST = ("pipeline", "flows", "ppo")  # folders


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers share the files (`make test`): those that take longest come first."""

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)
