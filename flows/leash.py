"""Run a command that cannot outlive whoever started it: `python flows/leash.py --parent PID -- COMMAND ...`.

The flow starts DVC and Prefect's server through this small process. It ends the command and everything that the command
started, whatever session they moved to, when it is told to (SIGINT, SIGTERM, SIGHUP), when its parent is gone (even by
SIGKILL), and when the command itself has ended and left something behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

POLL_SECONDS = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command that ends with its parent.")
    parser.add_argument("--parent", type=int, required=True, help="process id of the starter")
    parser.add_argument("--grace", type=float, default=5.0, help="seconds between asking to stop and SIGKILL")
    parser.add_argument("--spare", action="store_true", help="ask only what the command started, not the command")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()

    told: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _frame: told.append(number))
    _adopt_orphans()
    child = subprocess.Popen(args.command)
    while not _ended(child, POLL_SECONDS):
        if told or os.getppid() != args.parent:
            # a second signal means: at once
            _ask(child, args.grace, args.spare, hurry=lambda: len(told) > 1)
            break
    _kill_all()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent dies, so that `_descendants` still finds them (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_CHILD_SUBREAPER = 36
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _ended(child: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _ask(child: subprocess.Popen[bytes], grace: float, spare: bool, hurry: Callable[[], bool]) -> None:
    """SIGINT to every process once, those that appear meanwhile too, until the command ends or its time is up.

    DVC is spared: it ends by itself when its stage does, and an interrupt while it writes dvc.lock would tear the file.
    """
    asked: set[int] = {child.pid} if spare else set()
    deadline = time.monotonic() + grace
    while not _ended(child, POLL_SECONDS) and time.monotonic() < deadline and not hurry():
        for pid in _descendants() - asked:
            _signal(pid, signal.SIGINT)
            asked.add(pid)


def _kill_all() -> None:
    while pids := _descendants():
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.02)


def _descendants() -> set[int]:
    """All that live; a dead one that nobody has waited for counts no more."""
    import psutil  # 40 ms, so only when there is something to stop or to look for

    def lives(process: psutil.Process) -> bool:
        try:
            return bool(process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return {process.pid for process in psutil.Process().children(recursive=True) if lives(process)}


def _signal(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


if __name__ == "__main__":
    sys.exit(main())
