"""How PPO's time and memory grow: with batch, response length, trained layers and model size. Writes bench/growth.png.

One thing varies at a time, around SmolLM2-135M's shape with the top 6 layers trained, 16 episodes an update, prompts of
24 tokens and responses of 32. Random weights: only the shapes matter here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.ppo import line_of

PLOT = Path(__file__).parent / "growth.png"
START: dict[str, Any] = {"shape": "135M", "layers": 6, "batch": 16, "response-length": 32}
VARY: dict[str, list[Any]] = {
    "batch": [8, 16, 32, 64, 128],
    "response-length": [16, 32, 64, 128],
    "layers": [1, 6, 12, 18, "all"],
    "shape": ["10M", "45M", "135M", "360M"],
}
TITLES = {
    "batch": "episodes an update",
    "response-length": "response tokens",
    "layers": "trained layers of 30",
    "shape": "parameters",
}


def run(quick: bool, threads: int, console: Console) -> Iterator[dict[str, Any]]:
    for vary, values in VARY.items():
        for value in values[:2] if quick else values:
            console.print(f"[dim]growth: {TITLES[vary]}: {value} ...[/]")
            options = {**START, vary: value, "threads": threads, "warmup": 1, "updates": 2}
            layers = options.pop("layers")
            mode = ["--mode", "full"] if layers == "all" else ["--mode", "frozen_trunk", "--layers", str(layers)]
            command = [sys.executable, "-m", "bench.ours_side", *mode]
            figures = line_of(command + [str(part) for name, on in options.items() for part in (f"--{name}", on)])
            updates = len(figures["update_seconds"])
            yield {
                "bench": "growth",
                "vary": vary,
                "value": value,
                **{f"{phase}_s": figures["seconds"][phase] / updates for phase in ("generate", "score", "train")},
                "update_s": figures["seconds"]["total"] / updates,
                "peak_rss_bytes": figures["peak_rss_bytes"],
                "threads": threads,
            }


def table(records: list[dict[str, Any]]) -> Table:
    shown = Table(title="How PPO's cost grows", caption="SmolLM2-135M's shape, top 6 layers, 16 x (24 + 32) tokens")
    for column in ("varied", "value", "generate s", "score s", "train s", "update s", "peak GB"):
        shown.add_column(column, justify="left" if column == "varied" else "right")
    for row in records:
        seconds = [f"{row[f'{phase}_s']:.1f}" for phase in ("generate", "score", "train", "update")]
        shown.add_row(TITLES[row["vary"]], str(row["value"]), *seconds, f"{row['peak_rss_bytes'] / 1e9:.2f}")
    return shown


def plot(records: list[dict[str, Any]]) -> None:
    """Seconds an update, stacked by phase, over peak memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(VARY), figsize=(14, 6), sharey="row", layout="constrained")
    for column, (vary, title) in enumerate(TITLES.items()):
        rows = [row for row in records if row["vary"] == vary]
        places, names = range(len(rows)), [str(row["value"]) for row in rows]
        below = [0.0] * len(rows)
        for phase in ("generate", "score", "train"):
            heights = [row[f"{phase}_s"] for row in rows]
            axes[0][column].bar(places, heights, bottom=below, label=phase)
            below = [one + other for one, other in zip(below, heights, strict=True)]
        axes[1][column].bar(places, [row["peak_rss_bytes"] / 1e9 for row in rows], color="gray")
        for axis in (axes[0][column], axes[1][column]):
            axis.set_xticks(places, names)
        axes[1][column].set_xlabel(title)
    axes[0][0].set_ylabel("seconds an update")
    axes[1][0].set_ylabel("peak memory, GB")
    axes[0][0].legend()
    figure.savefig(PLOT, dpi=110)
