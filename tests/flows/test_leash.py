"""The leash: what it holds ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.server import leashed
from tests.flows.toy import wait_until

# a child that left for a session of its own, under a parent that ignores the polite signals
DEAF = """
import signal, subprocess, sys, time
from pathlib import Path
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
Path("child.txt").write_text(str(child.pid))
time.sleep(300)
"""
# ends after the stage that it waits for, and writes its lock file meanwhile
LIKE_DVC = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen(["sleep", "300"])
Path("child.txt").write_text(str(child.pid))
child.wait()
time.sleep(0.5)
Path("lock.txt").write_text("consistent")
sys.exit(7)
"""
STARTER = """
import subprocess, sys, time
from flows.server import leashed
subprocess.Popen(leashed([sys.executable, "-c", sys.argv[1]], grace=0.5), start_new_session=True)
time.sleep(300)
"""


def _child(folder: Path) -> int:
    assert wait_until(lambda: (folder / "child.txt").exists() and (folder / "child.txt").read_text() != "")
    return int((folder / "child.txt").read_text())


def _gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("code", [0, 3])
def test_gives_the_exit_code(code: int) -> None:
    assert subprocess.run(leashed(["sh", "-c", f"exit {code}"]), check=False).returncode == code


def test_killed_starter_leaves_nothing_even_in_another_session(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    starter = subprocess.Popen([sys.executable, "-c", STARTER, DEAF], cwd=tmp_path, env=environment)
    child = _child(tmp_path)
    starter.kill()
    starter.wait()
    assert wait_until(lambda: _gone(child))


def test_what_the_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    script = "sleep 300 & echo $! > child.txt"
    assert subprocess.run(leashed(["sh", "-c", script]), cwd=tmp_path, check=False).returncode == 0
    assert _gone(_child(tmp_path))


def test_spared_command_finishes_its_book_keeping(tmp_path: Path) -> None:
    process = subprocess.Popen(
        leashed([sys.executable, "-c", LIKE_DVC], spare=True), cwd=tmp_path, start_new_session=True
    )
    child = _child(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 7
    assert (tmp_path / "lock.txt").read_text() == "consistent"
    assert _gone(child)
