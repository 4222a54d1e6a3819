"""What pytest collects is the same everywhere: workers, and two machines, speak of a test by its id."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRINTABLE = re.compile(r"[ -~]+")
LONGEST = 60  # characters in the brackets of an id


def collected(**environment: str) -> list[str]:
    """The ids, as another process collects them."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider", str(ROOT / "tests")],
        cwd=ROOT,
        env=os.environ | environment,
        umask=0o077,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_process_collects_the_same_ids_and_they_are_short_words(request: pytest.FixtureRequest) -> None:
    here = [item.nodeid for item in request.session.items]
    files = {item.path for item in request.session.items}
    if files != set((ROOT / "tests").rglob("test_*.py")):  # only some tests run
        here = collected()
    time.sleep(1)  # nor may the clock's second be in an id
    strange = {"PYTHONHASHSEED": "7", "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "USER": "x", "LOGNAME": "x"}
    there = collected(**strange, RLHF_TEST_ORDER="7")
    assert there != here, "another order"
    assert sorted(there) == sorted(here)
    for one in here:
        words = one.partition("[")[2].removesuffix("]")
        assert len(words) <= LONGEST, one
        assert PRINTABLE.fullmatch(one), one
        assert not re.search(r"0x[0-9a-f]{5}|/tmp/|<lambda>", words), one


def test_no_test_is_empty() -> None:
    """A docstring, `...` and `pass` always pass."""
    empty = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                said = (ast.Pass, ast.Constant)
                if all(isinstance(getattr(line, "value", line), said) for line in node.body):
                    empty.append(f"{file.name}::{node.name}")
    assert empty == []
