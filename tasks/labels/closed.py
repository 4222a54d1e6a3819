"""Whether anybody still asks for the labels of a queue: by what stands beside it now, whatever has run since.

A queue whose parameters, raw data or samples are no longer those that it was opened with is closed: the next run asks
for something else. Were it all put back, it would be open again. Nothing is deleted.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.labels.queue import QUEUES, WAIT_FILE, Queue, origin, stamp
from tasks.lineage import StageSpec, load_stages
from tasks.params import Params, load_params
from tasks.stage import UserError

SHOWN = 3  # changes that are named
LONGEST = 40  # characters of a value that is shown


def folder_of(path: Path) -> Path:
    """The repository, or the run's workspace, that a queue's file lies in."""
    return path.parents[len(QUEUES.parts)]


def why_closed(path: Path, queue: Queue, now: float) -> str:
    """What has become of those who asked; empty while the queue is open. now: seconds since 1970."""
    folder = folder_of(path)
    try:
        if json.loads((folder / WAIT_FILE).read_text(encoding="utf-8"))["until"] < now:
            return f"The run {folder.name} waited as long as it may, and was given up."
    except (FileNotFoundError, KeyError, ValueError):
        pass  # it does not wait in a workspace
    if not queue.follows_from:
        return ""
    try:
        params = _params(folder / "params.yaml", *stamp(folder / "params.yaml"))
        specs = _stages(folder, *stamp(folder / "dvc.yaml"))
        found = origin(queue.job, params, specs, folder)
    except (OSError, UserError):  # somebody is just writing it
        return ""
    names = sorted(name for name in {*found, *queue.follows_from} if found.get(name) != queue.follows_from.get(name))
    told = [change(name, queue.follows_from.get(name), found.get(name)) for name in names[:SHOWN]]
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return f"Changed since it was opened: {', '.join([*told, *more])}." if told else ""


def change(name: str, before: Any, now: Any) -> str:
    if "/" in name:
        return name if now else f"{name}, which is not there now"
    texts = [json.dumps(value, ensure_ascii=False) for value in (before, now)]
    return f"{name} ({texts[0]} → {texts[1]})" if max(map(len, texts)) <= LONGEST else name


@lru_cache(maxsize=64)
def _params(path: Path, *_stamp: int) -> Params:
    return load_params(path)


@lru_cache(maxsize=64)
def _stages(folder: Path, *_stamp: int) -> dict[str, StageSpec]:
    return load_stages(folder)
