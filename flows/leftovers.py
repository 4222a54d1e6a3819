"""What a DVC that was killed may leave in the way of the next one."""

from __future__ import annotations

import json
from pathlib import Path

import psutil


def mend_leftovers(root: Path = Path()) -> None:
    """Remove DVC's list of busy paths when nobody in it is a living DVC.

    DVC drops dead process ids by itself, but takes another program that has since got the same id (in a container that
    is soon) for the one that it waits for, and gives up where the list itself is torn.
    """
    busy = root / ".dvc/tmp/rwlock"
    try:
        entries = json.loads(busy.read_text(encoding="utf-8"))
        owners = [
            *entries.get("write", {}).values(),
            *(info for infos in entries.get("read", {}).values() for info in infos),
        ]
        if any(_is_dvc(info["pid"]) for info in owners):
            return
    except FileNotFoundError:
        return
    except ValueError:
        pass  # torn
    busy.unlink()


def _is_dvc(pid: int) -> bool:
    try:
        return any(Path(word).name == "dvc" for word in psutil.Process(pid).cmdline()[:3])  # python [-m] dvc ...
    except psutil.Error:
        return False
