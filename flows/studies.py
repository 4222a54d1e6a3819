"""Questions that take several runs: how much chance is in a result, and would more labels help?

    python -m flows.studies variance --seeds 1 2 3
    python -m flows.studies data-efficiency --shares 0.125 0.25 0.5 1

`variance` repeats the pipeline over seeds; `data-efficiency` trains the reward model on ever more of the labels. Both
run the current commit, each point in a workspace of its own, and share what DVC's run cache already has. Nothing is
registered: a study changes no champion.
"""

from __future__ import annotations

import argparse
import base64
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from rich.console import Console
from rich.table import Table

from flows.console import terminal
from flows.dvc_stage import WAITS
from flows.scheduled import end_of, pipeline
from flows.server import prefect_server
from tasks.run import WAITS as EXIT_WAITS
from tasks.stage import UserError

STAGES = {"variance": ["report"], "data-efficiency": ["reward"]}
FIGURES = (  # without a gold score those by it are left out
    *("gold.sft", "gold.policy", "gold.gain", "win_rate"),
    *("score_win_rate", "kl", "fluency.policy", "reward.accuracy"),
)
OF_LABELS = tuple(
    f"reward.{name}"
    for name in ("train_prompts", "accuracy", "accuracy_low", "accuracy_high", "calibration_error", "noise_ceiling")
)


@flow(name="variance", flow_run_name="seeds {seeds}")
def variance(
    seeds: list[int] = [1, 2, 3],  # noqa: B006  # Prefect shows it as the default; nothing changes it
    params: dict[str, Any] | None = None,
    revision: str = "HEAD",
    repository: str = ".",
    notification: str | None = None,
) -> State[list[dict[str, Any]]]:
    """The pipeline once a seed; each figure's mean over them, its spread, and a 95 % interval of the mean."""
    check_seeds(seeds)
    runs = []
    for seed in seeds:
        changed = {**(params or {}), "seed": seed}
        state = pipeline(revision, STAGES["variance"], changed, repository, notification, return_state=True)
        runs.append(_point("seed", seed, state, FIGURES))
    done = [run for run in runs if run["result"] == "Completed"]
    create_table_artifact(key="rlhf-variance-runs", table=runs, description="a run a seed")
    end = end_of(runs, "seeds")
    if end.name == WAITS:
        return end
    if len(done) < 2:
        return Failed(message=f"{len(done)} of {len(seeds)} runs ended well; two are needed", data=runs)
    rows = [
        {"figure": name, **spread([run[name] for run in done])} for name in FIGURES if all(name in run for run in done)
    ]
    create_table_artifact(key="rlhf-variance", table=rows, description=f"over the seeds {seeds}")
    return Completed(message=f"{len(done)} of {len(seeds)} seeds", data=rows)


def check_seeds(seeds: Sequence[int]) -> None:
    if len(set(seeds)) < 2:
        raise UserError(f"the seeds are {list(seeds)}: two different ones are needed to say anything of the spread.")


def check_shares(shares: Sequence[float]) -> None:
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UserError(f"the shares are {list(shares)}: each must lie above 0 and be at most 1.")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation, and Student's 95 % interval of the mean."""
    from scipy import stats

    count, mean = len(values), sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return {"mean": mean, "standard_deviation": deviation, "low": mean - half, "high": mean + half, "seeds": count}


@flow(name="data-efficiency", flow_run_name="shares {shares}")
def data_efficiency(
    shares: list[float] = [0.125, 0.25, 0.5, 1.0],  # noqa: B006  # as above
    params: dict[str, Any] | None = None,
    revision: str = "HEAD",
    repository: str = ".",
    notification: str | None = None,
) -> State[list[dict[str, Any]]]:
    """The reward model on a share of the rankings, each share with all of the smaller ones; one held-out set."""
    check_shares(shares)
    rows = []
    for share in sorted(shares):
        changed = {**(params or {}), "reward.label_share": share}
        state = pipeline(revision, STAGES["data-efficiency"], changed, repository, notification, return_state=True)
        rows.append(_point("share", share, state, OF_LABELS))
    create_table_artifact(key="rlhf-data-efficiency", table=rows, description="reward model by share of the labels")
    if picture := curve(rows):
        create_markdown_artifact(picture, key="rlhf-data-efficiency-curve", description="do more labels pay?")
    return end_of(rows, "shares")


def _point(name: str, value: float, state: State[Any], kept: Sequence[str]) -> dict[str, Any]:
    """A run in a row, with the figures that are kept."""
    result = state.result(raise_on_failure=False)
    told: Mapping[str, Any] = result if isinstance(result, dict) else getattr(result, "facts", {})
    found = told.get("figures", {}) if state.is_completed() else {}
    figures = {figure: found[figure] for figure in kept if figure in found}
    return {name: value, "result": state.name, "branch": told.get("branch", ""), **figures}


def curve(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy with its interval over the number of prompts trained on, as a picture in Markdown."""
    drawn = draw(rows)
    encoded = base64.b64encode(drawn.encode()).decode()
    return f"![accuracy by number of labels](data:image/svg+xml;base64,{encoded})" if drawn else ""


def draw(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same as SVG; empty where no run has the figure."""
    from tasks import figures

    own = [row for row in rows if "reward.accuracy" in row]
    if not own:
        return ""
    figure, axis = figures.drawing(4.5, 3.0)
    x, y = [row["reward.train_prompts"] for row in own], [row["reward.accuracy"] for row in own]
    reach = figures.error_bars(own, "reward.accuracy")
    axis.errorbar(x, y, yerr=reach, marker="o", capsize=2, color=figures.SFT)
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [str(value) for value in x])
    axis.set_xlabel("ranked prompts trained on")
    axis.set_ylabel("held-out accuracy")
    return figures.svg(figure)


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table()
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "branch"))
    for name in columns:
        table.add_column(name.removeprefix("reward."), overflow="fold")
    for row in rows:
        cells = (row.get(name, "-") for name in columns)
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a run failed, 2 something to mend, 3 people must label something first, 130 stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.studies", description="How much chance is in a result, and would more labels help?"
    )
    commands = parser.add_subparsers(dest="study", required=True)
    told = "the pipeline once a seed: mean, spread and interval of each figure. As long as so many runs."
    seeds = commands.add_parser("variance", help=told, description=told)
    seeds.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    told = "the reward model on a share of the rankings each; what lies before it is made once"
    shares = commands.add_parser("data-efficiency", help=told, description=told)
    shares.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0], help="of the labels")
    shares.add_argument("--figure", type=Path, help="an SVG file for the curve, written at the end")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run is closed in MLflow too
    try:
        if arguments.study == "variance":
            check_seeds(arguments.seeds)
        else:
            check_shares(arguments.shares)
            if arguments.figure and not arguments.figure.absolute().parent.is_dir():
                raise UserError(f"--figure {arguments.figure}: there is no folder {arguments.figure.parent}.")
        with terminal() as log, prefect_server(log.print):
            if arguments.study == "variance":
                state = variance(arguments.seeds, return_state=True)
            else:
                state = data_efficiency(arguments.shares, return_state=True)
        rows = cast("list[dict[str, Any]] | Exception", state.result(raise_on_failure=False))
        if isinstance(rows, Exception):
            raise rows
    except KeyboardInterrupt:
        print("\nstopped; what is done is cached, and the same command goes on from here.", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    show(rows, console)
    if state.name == WAITS:
        print(state.message, file=sys.stderr)
        return EXIT_WAITS
    if state.is_failed():
        print(f"error: {state.message}", file=sys.stderr)
        return 1
    if arguments.study == "data-efficiency" and arguments.figure:
        arguments.figure.write_text(draw(rows), encoding="utf-8")
        print(f"the curve: {arguments.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
