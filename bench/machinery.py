"""What the machinery costs where there is nothing to do: DVC, the flow, a stage's way through both, the servers.

Measured in this repository, after `make run`: every stage of dvc.yaml is there and up to date.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
TIMES = 3
LIMITS = {
    "a no-op dvc repro": 1.5,
    "a no-op flow with its own server": 30,
    "a no-op flow against a running server": 9,
    "a stage's way through DVC, over python -m tasks.run": 2,
    "make serve where no run is active": 1,
}


def run(quick: bool, threads: int, console: Console) -> Iterator[dict[str, Any]]:
    """A record a figure: seconds, or GB of memory (proportional set size, so that shared pages count once)."""
    status = timed("dvc", "status", "--quiet")
    if status is None:
        sys.exit("`dvc status` says that something is out of date: run `make run` first.")
    console.print("[dim]machinery: no-op runs ...[/]")
    yield record("a no-op dvc repro", "s", [seconds("dvc", "repro") for _ in range(TIMES)])
    yield record("a no-op flow with its own server", "s", [seconds("flows.rlhf") for _ in range(1 if quick else TIMES)])
    alone = [seconds("tasks.run", "tickets") for _ in range(TIMES)]
    through = [seconds("dvc", "repro", "--force", "--single-item", "tickets") for _ in range(TIMES)]
    way = [statistics.median(through) - statistics.median(alone)]
    yield record("a stage's way through DVC, over python -m tasks.run", "s", way)
    console.print("[dim]machinery: make serve ...[/]")
    with subprocess.Popen([sys.executable, "-m", "flows.serve"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as serve:
        try:
            assert serve.stdout
            api = next(line.split()[1] for line in serve.stdout if line.startswith("Prefect ")) + "/api"
            for line in serve.stdout:
                if line.startswith("Ctrl-C"):
                    break
            time.sleep(20)  # until what they do at their start is done
            yield record("make serve where no run is active", "GB", [memory(serve.pid) / 1e9])
            times = [seconds("flows.rlhf", PREFECT_API_URL=api) for _ in range(TIMES)]
            yield record("a no-op flow against a running server", "s", times)
        finally:
            serve.terminate()


def record(what: str, unit: str, values: list[float]) -> dict[str, Any]:
    value = statistics.median(values)
    return {"bench": "machinery", "what": what, "unit": unit, "value": value, "all": values, "limit": LIMITS[what]}


def timed(*module: str, **environment: str) -> float | None:
    """Seconds that a module takes in the repository; None where it fails."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *module], cwd=ROOT, env=os.environ | environment, capture_output=True, check=False
    )
    return time.perf_counter() - started if done.returncode == 0 else None


def seconds(*module: str, **environment: str) -> float:
    took = timed(*module, **environment)
    if took is None:
        sys.exit(f"`python -m {' '.join(module)}` failed")
    return took


def memory(pid: int) -> int:
    """Bytes of a process and all below it."""
    root = psutil.Process(pid)
    return sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)])


def table(records: list[dict[str, Any]]) -> Table:
    shown = Table(title="What the machinery costs", title_justify="left")
    for column in ("", "measured", "at most"):
        shown.add_column(column, justify="right" if column else "left")
    for row in records:
        shown.add_row(row["what"], f"{row['value']:.2f} {row['unit']}", f"{row['limit']:g} {row['unit']}")
    return shown
