"""How `prepare` grows: comparisons of about 1 KB, chosen and rejected, through all checks. Writes bench/prepare.png.

The text is random words with the frequencies of natural language (Zipf); one row in twenty repeats another's prompt
with a word changed, one in fifty is damaged. `data/models/base` must be there (`dvc repro base`): its tokenizer counts.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
PLOT = Path(__file__).parent / "prepare.png"
SIZES = (10_000, 100_000, 1_000_000)
LIMIT_MINUTES, LIMIT_GB = 15, 4  # at a million
VOCABULARY = 20_000


def run(quick: bool, threads: int, console: Console) -> Iterator[dict[str, Any]]:
    if not (ROOT / "data/models/base/tokenizer.json").exists():
        sys.exit("data/models/base is not there: run `dvc repro base` first.")
    for rows in SIZES[:2] if quick else SIZES:
        with tempfile.TemporaryDirectory(dir=ROOT / ".rlhf") as scratch:
            root = Path(scratch)
            lay_out(root)
            size = write_comparisons(root / "data/raw/pairs.jsonl", rows, seed=1)
            console.print(f"[dim]prepare: {rows:,} rows, {size / 1e6:.0f} MB ...[/]")
            yield record("all rows new", rows, size, *measured(root))
            size = write_comparisons(root / "data/raw/more.jsonl", rows // 100, seed=2)
            yield record("one file of 1 % more", rows, size, *measured(root))


def record(what: str, rows: int, size: int, seconds: float, peak: int) -> dict[str, Any]:
    return {"bench": "prepare", "what": what, "value": rows, "bytes": size, "seconds": seconds, "peak_rss_bytes": peak}


def lay_out(root: Path) -> None:
    """A repository with nothing but what `python -m tasks.run prepare` needs."""
    for name in ("data/raw", "data/tickets", "data/models"):
        (root / name).mkdir(parents=True)
    for name in ("tasks", "dvc.yaml", "data/labels", "data/models/base"):
        (root / name).symlink_to(ROOT / name)
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    params["text"] = {"max_prompt_tokens": 1024, "max_response_tokens": 1024}
    params["data"] = {
        "sources": [
            {"kind": "rankings", "path": "data/raw", "splits": {"reward": 0.6, "ppo": 0.3, "eval": 0.05, "sft": 0.05}}
        ]
    }
    params["demonstrate"]["labeler"] = "human"  # comparisons are all that there is
    params["rank"]["labeler"] = "recorded"
    YAML(typ="safe").dump(params, root / "params.yaml")


def write_comparisons(path: Path, rows: int, seed: int) -> int:
    """Returns the size in bytes."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(VOCABULARY)]
    weights = list(accumulate(1 / (place + 3) for place in range(VOCABULARY)))

    def said(count: int) -> list[str]:
        return rng.choices(words, cum_weights=weights, k=count)

    last = said(60)
    with path.open("w") as file:
        for number in range(rows):
            prompt = said(60)
            if number % 20 == 0:
                prompt = [rng.choice(words), *last[1:]]
            last = prompt
            texts = [" ".join(part) for part in (prompt, said(55), said(55))]
            line = json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
            file.write((line[:-9] if number % 50 == 0 else line) + "\n")
    return path.stat().st_size


def measured(root: Path) -> tuple[float, int]:
    """(seconds, peak memory of all its processes in bytes; shared pages count once)."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    started = time.perf_counter()
    peak = [0]
    with subprocess.Popen([sys.executable, "-m", "tasks.run", "prepare"], cwd=root, env=environment) as process:

        def watch() -> None:
            while process.poll() is None:
                with suppress(psutil.Error):
                    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                    peak[0] = max(peak[0], sum(one.memory_full_info().pss for one in tree))
                time.sleep(0.5)

        watcher = threading.Thread(target=watch)
        watcher.start()
        if process.wait():
            sys.exit("`python -m tasks.run prepare` failed")
        seconds = time.perf_counter() - started
        watcher.join()
    return seconds, peak[0]


def table(records: list[dict[str, Any]]) -> Table:
    shown = Table(
        title="prepare: comparisons of 1 KB through all checks",
        caption=f"at a million: at most {LIMIT_MINUTES} minutes and {LIMIT_GB} GB",
        title_justify="left",
    )
    for column in ("", "rows", "MB read", "seconds", "rows/s", "peak GB"):
        shown.add_column(column, justify="right" if column else "left")
    for row in records:
        shown.add_row(
            *(row["what"], f"{row['value']:,}", f"{row['bytes'] / 1e6:,.0f}", f"{row['seconds']:,.1f}"),
            *(f"{row['value'] / row['seconds']:,.0f}", f"{row['peak_rss_bytes'] / 1e9:.2f}"),
        )
    return shown


def plot(records: list[dict[str, Any]]) -> None:
    """Seconds and memory by rows; a straight line of slope one is linear growth."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for what in dict.fromkeys(row["what"] for row in records):
        own = [row for row in records if row["what"] == what]
        rows = [row["value"] for row in own]
        time_axis.loglog(rows, [row["seconds"] for row in own], marker="o", label=what)
        memory_axis.semilogx(rows, [row["peak_rss_bytes"] / 1e9 for row in own], marker="o", label=what)
    first = next(row for row in records if row["what"] == "all rows new" and row["value"] == SIZES[-1])
    line = [first["seconds"] * size / SIZES[-1] for size in SIZES]
    time_axis.loglog(SIZES, line, color="gray", linestyle=":", label="linear")
    time_axis.axhline(LIMIT_MINUTES * 60, color="gray", linewidth=0.8)
    memory_axis.axhline(LIMIT_GB, color="gray", linewidth=0.8)
    time_axis.set(xlabel="rows", ylabel="seconds")
    memory_axis.set(xlabel="rows", ylabel="peak memory, GB", ylim=(0, None))
    time_axis.legend(frameon=False)
    figure.savefig(PLOT, dpi=110)
