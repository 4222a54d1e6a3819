"""For all tests."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# a job in the background of a shell starts with Ctrl-C ignored, and its children would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
# tiny models gain nothing by a second thread, and lose much where the machine is busy
os.environ.setdefault("OMP_NUM_THREADS", "1")

CHROMIUM = Path("/usr/bin/chromium")  # Debian's; playwright's own would have to be downloaded
LONGEST_ID = 18  # characters of one value
# folders and files
LONGEST_FIRST = ("pipeline", "flows", "test_judge", "ppo", "test_selection", "test_sft", "test_reward", "test_tracking")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers share the files (`make test`): those that take longest come first. Many tests wait: three for two cores.

    RLHF_TEST_ORDER=7: files, and the tests of each, in another order, one for each number. No test may mind.
    """
    if seed := os.environ.get("RLHF_TEST_ORDER"):
        random.Random(seed).shuffle(items)
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: files.index(item.path))
        return

    def place(item: pytest.Item) -> int:
        names = (item.path.parent.name, item.path.stem)
        return min((LONGEST_FIRST.index(name) for name in names if name in LONGEST_FIRST), default=len(LONGEST_FIRST))

    items.sort(key=place)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Ids are short words, the same in every process: workers refuse to run where they collected different tests.

    What pytest would spell out of bytes, of a long text or of a function without a name is named by its parameter;
    pytest numbers those that are alike.
    """
    wordy = isinstance(val, str) and (len(val) > LONGEST_ID or not (val.isascii() and val.isprintable()))
    return argname if wordy or isinstance(val, bytes) or getattr(val, "__name__", "") == "<lambda>" else None


@pytest.fixture(scope="module")  # not longer: while it is open, no other test could run an event loop
def browser() -> Iterator[Browser]:
    """A real browser without a window."""
    from playwright.sync_api import sync_playwright

    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM} to look at pages with")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()
