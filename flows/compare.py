"""Two runs side by side: `python -m flows.compare A B`.

A and B are commits or branches, registered versions (policy/3, policy@champion), or ids of MLflow runs; B is the
working tree where it is left out. What is shown: parameters that differ, figures that differ and whether the difference
is more than chance, and the answers that differ most.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.workspace import git
from tasks.ancestry import Store
from tasks.datasets import SideBySide, flat, read_figures, read_rows, rounded
from tasks.stage import UserError, parse_yaml
from tasks.tracking import OWN, connect, masked, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SAMPLES = "data/reports/evaluation/samples.jsonl"
REWARD_MODEL = "data/models/reward"
WORKING_TREE = "working tree"
SEED = 1
SHOWN = 3


@dataclass(frozen=True)
class Side:
    """What is known of one of the two."""

    name: str
    params: dict[str, str]  # with dotted names
    figures: dict[str, float]  # as MLflow has them: `eval/gold.gain`, and `_low` and `_high` where there is an interval
    samples: list[SideBySide] = field(default_factory=list)
    reward_model: str = ""  # its hash, where it is known


def side(name: str, repository: Path) -> Side:
    """UserError where the name means nothing, or where it has two meanings."""
    if name == WORKING_TREE:
        return from_files(name, lambda path: _text_of(repository / path), _reports_here(repository), repository)
    if re.match(r"(models:/)?policy[/@]", name):
        from tasks.registry import resolve

        client = connect()
        version = resolve(client, name)
        return from_mlflow(f"policy/{version.version}", client, version.tags["pipeline.id"], repository)
    try:
        commit = git(repository, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except UserError:
        return from_mlflow(name, connect(), _pipeline_of(connect(), name), repository)

    def read(path: str) -> str:
        try:
            return git(repository, "show", f"{commit}:{path}")
        except UserError:
            return ""

    listed = git(repository, "ls-tree", "-r", "--name-only", commit, "--", "data/reports").splitlines()
    return from_files(name, read, [path for path in listed if path.endswith("/metrics.json")], repository)


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _reports_here(repository: Path) -> list[str]:
    return [str(path.relative_to(repository)) for path in sorted(repository.glob("data/reports/*/metrics.json"))]


def from_files(name: str, read: Callable[[str], str], reports: list[str], repository: Path) -> Side:
    """From what git keeps. read: the text of a path, "" where there is none."""
    figures: dict[str, float] = {}
    for path in reports:
        report = read_figures(read(path))
        figures |= _figures({"eval": report} if path.startswith("data/reports/evaluation/") else report)
    if not figures:
        raise UserError(f"{name} has no reports in data/reports: nothing was run there, or it was not committed.")
    lock = parse_yaml(read("dvc.lock"), "dvc.lock") or {}
    outs = [out for stage in lock.get("stages", {}).values() for out in stage.get("outs", [])]
    hashes = {out["path"]: out["md5"] for out in outs if out["path"] in (SAMPLES, REWARD_MODEL)}
    return Side(
        name,
        {key: str(value) for key, value in flat(parse_yaml(read("params.yaml"), "params.yaml")).items()},
        figures,
        _samples(hashes.get(SAMPLES, ""), repository),
        hashes.get(REWARD_MODEL, ""),
    )


def from_mlflow(name: str, client: MlflowClient, pipeline: str, repository: Path) -> Side:
    """From the runs of a pipeline's stages, and of those that it found cached."""
    runs = _runs_of(client, pipeline)
    if not runs:
        raise UserError(f"MLflow at {masked(tracking_uri())} has no finished stage of the run behind {name}.")
    params: dict[str, str] = {}
    figures: dict[str, float] = {}
    tags: dict[str, str] = {}
    for run in runs:
        params |= run.data.params
        figures |= {key: value for key, value in run.data.metrics.items() if not key.startswith(OWN)}
        tags |= run.data.tags
    samples, reward_model = (tags.get(f"dvc.out.{out}", "") for out in (SAMPLES, REWARD_MODEL))
    return Side(name, params, figures, _samples(samples, repository), reward_model)


def _runs_of(client: MlflowClient, pipeline: str) -> list[Run]:
    experiment = client.get_experiment_by_name("rlhf")
    if experiment is None:
        return []
    found = client.search_runs([experiment.experiment_id], f"tags.`pipeline.id` = '{pipeline}'", max_results=200)
    cached = [value for run in found for key, value in run.data.tags.items() if key.startswith("cached.")]
    stages = [run for run in found if "dvc.stage" in run.data.tags and run.info.status == "FINISHED"]
    return [*(client.get_run(run_id) for run_id in cached), *stages]


def _pipeline_of(client: MlflowClient, name: str) -> str:
    """Of an MLflow run whose id begins like this."""
    experiment = client.get_experiment_by_name("rlhf")
    runs = client.search_runs([experiment.experiment_id], max_results=5000) if experiment else []
    found: set[str] = {run.data.tags.get("pipeline.id", "") for run in runs if run.info.run_id.startswith(name)}
    if len(name) < 4:
        raise UserError(
            f"`{name}` is no commit, branch or version here; of an MLflow run's id give at least 4 characters."
        )
    if not found:
        raise UserError(
            f"`{name}` is no commit or branch here, no version such as policy/3, and no run of MLflow at "
            f"{masked(tracking_uri())} begins with it."
        )
    if len(found) > 1:
        raise UserError(f"several runs of MLflow begin with `{name}`; give more of the id.")
    return found.pop()


def _samples(md5: str, repository: Path) -> list[SideBySide]:
    """The answers by their hash; none where they are in no store that can be reached."""
    if not md5:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.jsonl"
        try:
            Store(repository).put(SAMPLES, md5, file)
        except UserError:
            return []
        return read_rows(file, SideBySide)


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    """{"reward": {"accuracy": 0.8}} -> {"reward/accuracy": 0.8}"""
    return {
        key.replace(".", "/", 1): float(value)
        for key, value in flat(report).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


# ---------------------------------------------------------------------------------------------------------------------


def show(one: Side, other: Side, console: Console) -> None:
    console.print(params_table(one, other))
    if one.samples and other.samples:
        console.print(paired_table(one, other))
    console.print(figures_table(one, other))
    for table in most_different(one, other):
        console.print(table)


def same_judge(one: Side, other: Side) -> bool:
    """Whether scores may be compared: those of two reward models may not."""
    return one.reward_model == other.reward_model or "" in (one.reward_model, other.reward_model)


def params_table(one: Side, other: Side) -> Table | str:
    differ = sorted(
        key for key in one.params.keys() | other.params.keys() if one.params.get(key) != other.params.get(key)
    )
    if not differ:
        return "The parameters are the same."
    table = Table(title="Parameters that differ", title_justify="left")
    for heading in ("parameter", one.name, other.name):
        table.add_column(heading, overflow="fold")
    for key in differ:
        table.add_row(key, one.params.get(key, "-"), other.params.get(key, "-"))
    return table


def paired_table(one: Side, other: Side) -> Table | str:
    """The policies on the prompts that both have answered: the same prompts, so the surest comparison there is."""
    import torch

    from tasks.intervals import RESAMPLES, resamples, wins, with_interval

    theirs = {row.prompt: row.scores for row in other.samples}
    pairs = [(row.scores, theirs[row.prompt]) for row in one.samples if row.prompt in theirs]
    if not pairs:
        return "They answered no prompt in common: figures can be compared, answers cannot."
    table = Table(title=f"The policies on the {len(pairs)} prompts that both answered", title_justify="left")
    for heading in ("", one.name, other.name, "difference [95 % interval]", "verdict"):
        table.add_column(heading, overflow="fold")
    for judge in ("gold", "score"):
        key = f"{judge}.policy"
        judged = [pair for pair in pairs if all(key in scores for scores in pair)]
        if not judged:
            table.add_row(judge, "", "", "", Text("no gold score: these prompts have no ticket", style="dim"))
            continue
        if judge == "score" and not same_judge(one, other):
            table.add_row(judge, "", "", "", Text("of two reward models: cannot be compared", style="dim"))
            continue
        ours, others = (torch.tensor([scores[key] for scores in column]) for column in zip(*judged, strict=True))
        picks = resamples(len(judged), RESAMPLES, SEED)
        found = with_interval("x", others - ours, picks)
        table.add_row(
            judge if len(judged) == len(pairs) else f"{judge} ({len(judged)} prompts)",
            f"{ours.mean():.3f}",
            f"{others.mean():.3f}",
            _interval(found["x"], found["x_low"], found["x_high"], "+.3f"),
            verdict(found["x_low"], found["x_high"], 0.0, one.name, other.name),
        )
        won = with_interval("x", wins(others, ours), picks)
        table.add_row(
            f"wins by {judge}",
            f"{1 - won['x']:.0%}",
            _interval(won["x"], won["x_low"], won["x_high"], ".0%"),
            "",
            verdict(won["x_low"], won["x_high"], 0.5, one.name, other.name),
        )
    return table


def verdict(low: float, high: float, even: float, one: str, other: str) -> Text:
    """Of an interval of what `other` has more than `one`."""
    if low > even:
        return Text(f"{other} is better", style="green")
    if high < even:
        return Text(f"{one} is better", style="green")
    return Text("no difference" if low == high else "no difference shown", style="dim")


def _interval(value: float, low: float, high: float, spec: str) -> str:
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def figures_table(one: Side, other: Side) -> Table | str:
    """Every other figure that both have and that differs; apart: their intervals do not touch."""
    shared = one.figures.keys() & other.figures.keys()  # MLflow keeps more than the reports, and both serve as a side
    bounds_of_others = {f"{name}{end}" for name in shared for end in ("_low", "_high")}
    names = sorted(
        name
        for name in shared - bounds_of_others
        if rounded(one.figures[name]) != rounded(other.figures[name])  # MLflow has them rounded
    )
    if not names:
        return f"The {len(shared)} figures that both have are the same."
    table = Table(title="Figures that differ", title_justify="left")
    for heading in ("figure", one.name, other.name, "intervals"):
        table.add_column(heading, overflow="fold")
    for name in names:
        bounds = [_bounds(which.figures, name) for which in (one, other)]
        apart = ""
        if all(bounds):
            (low, high), (low_too, high_too) = (bound for bound in bounds if bound)
            apart = "apart" if high < low_too or high_too < low else "overlap"
        table.add_row(name, _cell(one.figures, name), _cell(other.figures, name), apart)
    return table


def _bounds(figures: Mapping[str, float], name: str) -> tuple[float, float] | None:
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    return None if low is None or high is None else (low, high)


def _cell(figures: Mapping[str, float], name: str) -> str:
    bounds = _bounds(figures, name)
    return f"{figures[name]:.4g}" + (f" [{bounds[0]:.3g}, {bounds[1]:.3g}]" if bounds else "")


def most_different(one: Side, other: Side) -> list[Table]:
    """The prompts on which the two policies' answers are judged most differently; where scores cannot be compared, the
    first on which they differ."""
    theirs = {row.prompt: row for row in other.samples}
    pairs = [(row, theirs[row.prompt]) for row in one.samples if row.prompt in theirs]
    judge = "gold.policy" if all("gold.policy" in row.scores for pair in pairs for row in pair) else "score.policy"
    pairs = [pair for pair in pairs if pair[0].policy != pair[1].policy]
    if judge == "gold.policy" or same_judge(one, other):
        pairs.sort(key=lambda pair: -abs(pair[0].scores[judge] - pair[1].scores[judge]))
    tables = []
    for ours, others in pairs[:SHOWN]:
        table = Table(title=Text(ours.prompt), title_justify="left", show_lines=True)
        table.add_column(f"{one.name} ({judge} {ours.scores[judge]:.2f})", ratio=1, overflow="fold")
        table.add_column(f"{other.name} ({judge} {others.scores[judge]:.2f})", ratio=1, overflow="fold")
        table.add_row(Text(ours.policy), Text(others.policy))
        tables.append(table)
    return tables


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.compare",
        description="Two runs side by side: parameters, figures, and the answers that differ most.",
        epilog="A and B: a commit or branch, a version (policy/3, policy@champion), or the id of an MLflow run.",
    )
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B", nargs="?", default=WORKING_TREE, help="default: the working tree")
    arguments = parser.parse_args(argv)
    from mlflow.exceptions import MlflowException

    try:
        repository = Path(git(Path(), "rev-parse", "--show-toplevel"))
        one, other = (side(name, repository) for name in (arguments.a, arguments.b))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MlflowException, OSError) as error:
        print(f"error: MLflow at {masked(tracking_uri())}: {masked(str(error)).splitlines()[0]}", file=sys.stderr)
        return 2
    show(one, other, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
