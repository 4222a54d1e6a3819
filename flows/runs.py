"""What each run changed, and what came of it: `make runs`, or `python -m flows.runs [--last N]`.

Out of MLflow's record, newest first: the parameters that are not as in the run before, the policy's gold score, what a
language model as judge and the reward model say of it, its win rate over the SFT model, KL and gates. A star marks the
champion.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.lineage import describe_changes, differing
from tasks.registry import champion
from tasks.stage import UserError
from tasks.tracking import EXPERIMENT, connect, mlflow_told

if TYPE_CHECKING:
    from mlflow.entities import Run

STAR = "★"
# The first that a run has; as tasks/gates.py asks them
WIN_RATES = ("eval/win_rate", "judge/versus.sft.win_rate", "eval/score_win_rate")
STATES = {"RUNNING": "running", "SCHEDULED": "waits", "FAILED": "failed", "KILLED": "stopped"}


@dataclass(frozen=True)
class Row:
    """A run as the table shows it."""

    run: str
    policy: str  # policy/3, where it was registered
    is_champion: bool
    when: datetime
    changed: str
    gold: str
    judge: str
    score: str
    win_rate: str
    kl: str
    gates: str


def pipelines(last: int) -> tuple[list[Run], str]:
    """(the newest runs of the pipeline and the one before them, newest first; the champion)"""
    with mlflow_told():
        client = connect()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        runs = experiment and client.search_runs(
            [experiment.experiment_id],
            "tags.`rlhf.kind` = 'pipeline'",
            max_results=last + 1,
            order_by=["attributes.start_time DESC"],
        )
        if not runs:
            raise UserError("MLflow has no run of the pipeline yet: `make run` makes one.")
        current = champion(client)
    return list(runs), f"policy/{current.version}" if current else ""


def rows_of(runs: Sequence[Run], last: int, champion: str, against_first: bool = False) -> list[Row]:
    """The first `last` of the runs, each with what differs from the run before or from the oldest of them."""
    shown = runs[:last]
    befores = [runs[-1]] * len(shown) if against_first else [*runs[1:], *runs[-1:]]
    return [_row(run, before, champion) for run, before in zip(shown, befores, strict=False)]


def _row(run: Run, before: Run, champion: str) -> Row:
    metrics, tags = run.data.metrics, run.data.tags
    policy = tags.get("policy", "")
    state = STATES.get(run.info.status, "")
    return Row(
        run=run.info.run_id[:8],
        policy=policy,
        is_champion=bool(policy) and policy == champion,
        when=datetime.fromtimestamp(run.info.start_time / 1000),
        changed=describe_changes(differing(before.data.params, run.data.params)) or run.info.run_name or "",
        gold=_figure(metrics, "all/gold"),
        judge=_percent(metrics, "judge/versus.sft.win_rate"),
        score=_figure(metrics, "all/score"),
        win_rate=next((_percent(metrics, name) for name in WIN_RATES if name in metrics), ""),
        kl=_figure(metrics, "all/kl"),
        gates="; ".join(text for text in (state, f"gates {tags['gates']}" if "gates" in tags else "") if text),
    )


def _figure(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.3g}" if name in metrics else ""


def _percent(metrics: Mapping[str, float], name: str) -> str:
    """`78 [71, 85]`"""
    if name not in metrics:
        return ""
    bounds = [metrics.get(f"{name}{end}") for end in ("_low", "_high")]
    interval = ", ".join(f"{100 * bound:.0f}" for bound in bounds if bound is not None)
    return f"{100 * metrics[name]:.0f}" + (f" [{interval}]" if interval else "")


def table_of(rows: Sequence[Row]) -> Table:
    """Columns that no row fills are left out; a long name goes on in the next line."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, show_edge=False, padding=(0, 1, 0, 0))
    columns = {
        "run": [_lines(row.run, f"{row.policy} {STAR}" if row.is_champion else row.policy) for row in rows],
        "when": [f"{row.when:%m-%d\n%H:%M}" for row in rows],
        "what changed; gates": [_lines(row.changed, row.gates) for row in rows],
        "gold": [row.gold for row in rows],
        "judge %": [row.judge for row in rows],
        "score": [row.score for row in rows],
        "win rate %": [row.win_rate for row in rows],
        "KL": [row.kl for row in rows],
    }
    filled = {heading: cells for heading, cells in columns.items() if any(cells)}
    for heading in filled:
        table.add_column(heading, overflow="fold")
    for line in zip(*filled.values(), strict=True):
        table.add_row(*map(Text, line))  # names are no markup
    return table


def _lines(*texts: str) -> str:
    return "\n".join(text for text in texts if text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.runs", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--last", type=int, default=20, metavar="N", help="so many of the newest runs (default: 20)")
    parser.add_argument(
        "--against-first", action="store_true", help="what differs from the oldest of them, not from the run before"
    )
    arguments = parser.parse_args(argv)
    if arguments.last < 1:
        parser.error("--last must be at least 1")
    try:
        runs, current = pipelines(arguments.last)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(table_of(rows_of(runs, arguments.last, current, arguments.against_first)))
    console.print(f"win rate: over the SFT model, with its 95 % interval; {STAR}: the champion")
    return 0


if __name__ == "__main__":
    sys.exit(main())
