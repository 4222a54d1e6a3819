"""The pictures of a run, drawn from its tables. The same tables give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BASE, SFT, POLICY = "#888888", "#1f77b4", "#d62728"
mpl.rcParams.update({"figure.dpi": 100, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
mpl.rcParams["svg.hashsalt"] = "rlhf"  # else names within the file are new each time
FEW = 10  # prompts
Rows = Sequence[Mapping[str, Any]]


def svg(figure: Figure) -> str:
    """As text that stands in a page, without the XML header, and without a date."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def drawing(width: float = 6.0, height: float = 3.2, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained")


def over_optimisation(rows: Rows, kept: int) -> Figure:
    """What score and gold score gain over the SFT model against the square root of KL (Gao et al. 2023, figure 1).

    Without a gold score there is one panel.
    """
    told = {"score_gain": "gain in reward-model score", "gold_gain": "gain in gold score"}
    names = [name for name in told if any(row.get(name) for row in rows)]
    figure, _ = drawing(4.0 * len(names), 3.4, columns=len(names))
    for axis, name in zip(figure.axes, names, strict=True):
        axis.set_ylabel(told[name])
        for source, colour, marker in (("ppo", POLICY, "o"), ("best of n", SFT, "s")):
            own = [row for row in rows if row["source"] == source and row.get(name)]
            own.sort(key=lambda row: int(row["point"]))
            x, y = [float(row["root_kl"]) for row in own], [float(row[name]) for row in own]
            bars = error_bars(own, name)
            axis.errorbar(x, y, yerr=bars, color=colour, marker=marker, markersize=4, capsize=2, label=source)
            for row, place, height in zip(own, x, y, strict=True):
                axis.annotate(str(row["point"]), (place, height), xytext=(3, 4), textcoords="offset points", fontsize=7)
        for row in rows:
            if row["source"] == "ppo" and int(row["point"]) == kept:
                place = float(row["root_kl"])
                axis.axvline(place, color=POLICY, linewidth=0.8, linestyle=":", label="the policy that is kept")
        axis.axhline(0, color="#aaaaaa", linewidth=0.8)
        axis.set_xlabel("√KL from the SFT model, √nats")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper left", ncols=3
    )
    return figure


def error_bars(rows: Rows, name: str) -> list[list[float]]:
    """How far the intervals of a figure reach below and above it."""
    return [
        [float(row[name]) - float(row[f"{name}_low"]) for row in rows],
        [float(row[f"{name}_high"]) - float(row[name]) for row in rows],
    ]


def bars(rows: Rows, label: str, value: str, axis_label: str, zero: float = 0.0) -> Figure:
    """A horizontal bar a row, with its interval. Rows that count their prompts say how many; of fewer than FEW the
    bootstrap makes the interval too narrow, and it is left out."""
    figure, axis = drawing(6.0, 0.8 + 0.24 * len(rows))
    values = [float(row[value]) for row in rows]
    places = range(len(rows))
    axis.barh(places, values, color=SFT, height=0.7)
    sure = [place for place, row in enumerate(rows) if int(row.get("prompts", FEW)) >= FEW]
    reach = error_bars([rows[place] for place in sure], value)
    axis.errorbar(
        [values[place] for place in sure], sure, xerr=reach, fmt="none", ecolor="#444444", elinewidth=1, capsize=2
    )
    counts = [f" ({row['prompts']})" if "prompts" in row else "" for row in rows]
    axis.set_yticks(list(places), [f"{row[label]}{count}" for row, count in zip(rows, counts, strict=True)])
    axis.invert_yaxis()
    axis.axvline(zero, color="black", linewidth=0.8)
    axis.set_xlabel(axis_label)
    return figure


def reliability(rows: Rows) -> Figure:
    """How often the reward model was right, by how sure it was; on the diagonal it knows what it knows."""
    figure, axis = drawing(3.6, 3.2)
    axis.plot([0.5, 1], [0.5, 1], color="#aaaaaa", linewidth=0.8)
    sizes = [12 + 4 * float(row["pairs"]) for row in rows]
    axis.scatter(
        [float(row["confidence"]) for row in rows],
        [float(row["accuracy"]) for row in rows],
        s=sizes,
        color=SFT,
        alpha=0.7,
    )
    axis.set_xlabel("how sure")
    axis.set_ylabel("how often right")
    return figure


def score_distributions(scores: Mapping[str, Sequence[float]]) -> Figure:
    """Of each source a histogram, one above the other, on one scale."""
    figure, axis = drawing(6.0, 3.0)
    values = [value for own in scores.values() for value in own]
    edges = [min(values) + (max(values) - min(values)) * step / 40 for step in range(41)]
    for (source, own), colour in zip(scores.items(), (BASE, "#2ca02c", SFT, POLICY), strict=False):
        axis.hist(own, bins=edges, density=True, histtype="step", linewidth=1.4, color=colour, label=source)
    axis.set_xlabel("reward-model score")
    axis.set_yticks([])
    axis.legend(frameon=False, fontsize=8)
    return figure


def curves(rows: Rows, x: str, names: Sequence[str]) -> Figure:
    """One panel a figure, over the steps that have it."""
    figure, axes = drawing(2.7 * len(names), 2.4, columns=len(names))
    for axis, name in zip(axes, names, strict=True):
        own = [row for row in rows if row.get(name) not in (None, "")]
        axis.plot([float(row[x]) for row in own], [float(row[name]) for row in own], color=POLICY, marker=".")
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel(x)
    return figure


class Histogram(NamedTuple):
    counts: np.ndarray  # (B,)
    edges: np.ndarray  # (B + 1,)
    limit: int  # drawn as a line


def histograms(panels: Mapping[str, Sequence[Histogram]], axis_labels: Sequence[str]) -> Figure:
    """A row of panels a name, a column a label."""
    figure, axes = drawing(8.0, 0.6 + 1.3 * len(panels), columns=len(axis_labels), rows=len(panels))
    axes = np.reshape(axes, (len(panels), len(axis_labels)))
    for row, (name, drawn) in zip(axes, panels.items(), strict=True):
        row[0].set_title(name, fontsize=9, loc="left", parse_math=False)
        for axis, histogram in zip(row, drawn, strict=True):
            axis.stairs(histogram.counts, histogram.edges, fill=True, color=SFT)
            axis.axvline(histogram.limit, color=POLICY, linewidth=1, linestyle=":")
            axis.set_ylim(0, 1.05 * max(1, histogram.counts.max()))
            axis.locator_params(axis="y", nbins=3, integer=True)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_major_formatter("{x:,.0f}")
    for axis, label in zip(axes[-1], axis_labels, strict=True):
        axis.set_xlabel(label)
    return figure


def shares(counts: pd.DataFrame, colours: Mapping[str, str]) -> Figure:
    """A horizontal bar an index entry, parted by the columns; how much the whole is stands beside its name."""
    figure, axis = drawing(8.0, 0.9 + 0.28 * len(counts))
    whole = counts.sum(axis=1)
    parts = counts.div(whole.where(whole > 0, 1), axis=0)
    places = range(len(counts))
    left = np.zeros(len(counts))
    for name, colour in colours.items():
        axis.barh(places, parts[name], left=left, color=colour, height=0.7, label=name)
        left += parts[name].to_numpy()
    axis.set_yticks(list(places), [f"{name} ({rows:,})" for name, rows in whole.items()], parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter("{x:.0%}")
    figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=len(colours))
    return figure
