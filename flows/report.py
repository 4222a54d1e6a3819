"""What stays of a run: MLflow's record, the table of the stages, one prompt answered by each model, the verdict, and
what to do next. What a stage says that was not part of the run is left out."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flows.dvc_stage import Outcome
from tasks.datasets import read_figures
from tasks.labels.whose import whose_labels
from tasks.lineage import StageSpec, git_state, locked_outs
from tasks.registry import champion
from tasks.tracking import connect, runs_url
from tasks.verdict import in_markdown, with_champion

SAMPLES = Path("data/reports/evaluation/samples.jsonl")
METRICS = SAMPLES.parent / "metrics.json"
REGISTERED = Path("data/reports/registered.json")
LABELS = {stage: Path(f"data/reports/{stage}/metrics.json") for stage in ("demonstrate", "rank")}
SHOWN = 5  # prompts in the Markdown report
COLOURS = {"ran": "green", "cached": "blue", "failed": "bold red", "waits": "bold yellow", "not run": "dim"}
TOLD = {"failed": "failed", "waits": "waits for people"}


@dataclass(frozen=True)
class Row:
    """One stage in the table at the end."""

    stage: str
    status: str
    seconds: float | None
    figure: str
    url: str
    told: str  # why it failed, or what it waits for


Report = list[Row]


@dataclass
class Pipeline:
    """One run of the flow, as MLflow keeps it: the parent of its stages' runs."""

    id: str
    status: str = "KILLED"  # until the flow has got to its end
    page: str = ""  # the flow run on Prefect's server
    url: str = ""  # of its MLflow run
    note: str = ""  # what failed or waits, in Markdown

    @property
    def ids(self) -> dict[str, str]:
        """What a stage's process must know to log under this run."""
        return {"RLHF_PIPELINE_ID": self.id, "RLHF_FLOW_RUN_ID": self.id, "RLHF_FLOW_RUN_URL": self.page}

    def row(self, spec: StageSpec, outcome: Outcome) -> Row:
        from tasks import tracking

        done = outcome.status in ("ran", "cached")
        if outcome.status == "cached":
            url = tracking.link_cached(self.id, spec, locked_outs(spec.name))
        else:
            url = tracking.stage_run_url(self.id, spec.name) if outcome.status != "not run" else ""
        figure = figure_of(spec) if done else ""
        return Row(spec.name, outcome.status, outcome.seconds, figure, url, outcome.told)


@contextmanager
def pipeline_record() -> Iterator[Pipeline]:
    """Open the pipeline's MLflow run, and close it however the flow ends."""
    from tasks import tracking  # mlflow takes seconds to import

    id = str(flow_run.get_id())
    pipeline = Pipeline(id, page=url_for("flow-run", id) or "")
    commit, dirty = git_state()
    tags = {"git.commit": commit, "git.dirty": str(dirty).lower(), "prefect.flow_run_id": pipeline.id}
    if pipeline.page:
        tags["prefect.url"] = pipeline.page
    pipeline.url = tracking.open_pipeline(pipeline.id, tags)
    try:
        yield pipeline
    except Exception:
        pipeline.status = "FAILED"
        raise
    finally:
        tracking.close_pipeline(pipeline.id, pipeline.status, pipeline.note)


def figure_of(spec: StageSpec, root: Path = Path()) -> str:
    """`gold.gain 0.21`: the figure that dvc.yaml names for the stage, out of the JSON files that it writes.

    `gold.gain or score.gain`: the first that there is.
    """
    files = [root / out for out in spec.outs if out.endswith(".json")]
    reports = [read_figures(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    for key in spec.meta.get("figure", "").split(" or "):
        for report in reports:
            value = _at(report, key.split("."))
            if value is not None:
                return f"{key} {_plain(value)}"
    return ""


def _at(tree: Any, keys: list[str]) -> Any:
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def publish(report: Report, record: str) -> None:
    """On the flow run's page: the table, the evaluation, and the way to MLflow's record."""
    if record:
        create_link_artifact(record, "the record in MLflow", key="rlhf-mlflow")
    told = [in_markdown(of_this_run)] if (of_this_run := verdict_of(report)) else []
    told += [evaluation()] if done(report, "evaluate") and SAMPLES.exists() else []
    if told:
        create_markdown_artifact("\n\n".join(told), key="rlhf-evaluation", description="Did it help?")
    rows = [
        {
            "stage": row.stage,
            "result": row.status,
            "seconds": "" if row.seconds is None else round(row.seconds, 1),
            "main figure": row.figure,
            "MLflow run": f"[open]({row.url})" if row.url else "",
        }
        for row in report
    ]
    create_table_artifact(key="rlhf-stages", table=rows, description="The stages of this run")


def done(report: Report, stage: str) -> bool:
    """Whether what the stage wrote is of this run: another one's figures and answers are not shown as if they were."""
    return any(row.stage == stage and row.status in ("ran", "cached") for row in report)


def verdict_of(report: Report) -> dict[str, Any] | None:
    """What `register` wrote, where it was part of the run, with who is the champion now."""
    from mlflow.exceptions import MlflowException  # mlflow takes seconds to import

    if not (done(report, "register") and REGISTERED.exists()):
        return None
    told = json.loads(REGISTERED.read_text(encoding="utf-8")).get("verdict")
    if told is None:
        return None
    try:
        current = champion(connect())
    except (MlflowException, OSError):  # what it was when `register` ran
        return dict(told)
    return with_champion(told, f"policy/{current.version}" if current else "")


def evaluation() -> str:
    """The main figures with their intervals, and some prompts answered by each model, as Markdown."""
    figures = read_figures(METRICS.read_text(encoding="utf-8"))
    same = _at(figures, ["overoptimisation", "kept_update"]) == 0
    rows = ["| | base | SFT | policy | gain of the policy |", "|---|---|---|---|---|"]
    for name in ("gold", "score", "fluency"):
        if name in figures:
            cells = [_interval(figures[name], key) for key in ("base", "sft", "policy", "gain")]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    if "gold" not in figures:
        rows += ["", "There is no gold score: these prompts have no ticket."]
    more = {
        "win rate over SFT by the gold score": "win_rate",
        "win rate over SFT by the reward model": "score_win_rate",
        "KL from SFT, nats": "kl",
    }
    if same:
        more = {}
        rows += ["", "PPO kept update 0: the policy is the SFT model."]
    if all(file.exists() for file in LABELS.values()):
        labels = whose_labels({stage: read_figures(file.read_text(encoding="utf-8")) for stage, file in LABELS.items()})
        rows += ["", f"Labels: {labels}."]
    rows += ["", *(f"- {told}: {_interval(figures, key)}" for told, key in more.items() if key in figures), ""]
    samples = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()[:SHOWN]]
    for sample in samples:
        rows.append(f"**{quoted(sample['prompt'])}**\n")
        for model in ("base", "sft", "policy"):
            score = sample["scores"].get(f"score.{model}")
            rows.append(f"- {model}{'' if score is None else f' ({score:.2f})'}: {quoted(sample[model])}")
        rows.append("")
    return "\n".join(rows)


def _interval(section: dict[str, float], name: str) -> str:
    if name not in section:
        return ""
    return f"{section[name]:.3g} [{section[f'{name}_low']:.3g}, {section[f'{name}_high']:.3g}]"


def quoted(text: str) -> str:
    """A model's text must not become markup of ours."""
    return " ".join(re.sub(r"([\\`*_{}\[\]()#+!|<>~$-])", r"\\\1", text).split())


def print_report(report: Report, console: Console, stale: Sequence[str] = (), *, quick: bool = False) -> None:
    """stale: the stages that were not asked for and are out of date. quick: a run whose figures mean nothing."""
    table = _table(report, wide=True)
    wide = Measurement.get(console, console.options, table).maximum <= console.width
    console.print(table if wide else _table(report, wide=False))
    if not wide:
        for row in report:
            if row.url:
                console.print(f"{row.stage:<12} {row.url}", soft_wrap=True)
    for row in report:
        if row.told:
            heading = Text(f"\n{row.stage} {TOLD[row.status]}:", style=COLOURS[row.status])
            console.print(heading, Text(row.told), sep="\n", soft_wrap=True)
    if any(row.status == "failed" for row in report):
        console.print("\nMend that and run the same command again: what is done stays done.")
        return
    if any(row.status == "waits" for row in report):
        return
    if done(report, "evaluate") and SAMPLES.exists():
        console.print(_answers(json.loads(SAMPLES.read_text(encoding="utf-8").splitlines()[0])))
    if quick:
        console.print(_QUICK, soft_wrap=True)
        return
    found = verdict_of(report)
    if found:
        console.print(Text(f"\n{found['headline']}", style="bold"))
        console.print(_grid((row["name"], row["text"]) for row in found["facts"]))
    if stale:
        console.print(
            f"\nOut of date, and not asked for: {', '.join(stale)}. Their figures in data/reports are of an "
            "earlier run; `make run` brings them up to date.",
            soft_wrap=True,
        )
    console.print("\nWhat comes next")
    console.print(_grid(_next(report, found)))
    if urls := [row.url for row in report if row.url]:
        console.print(f"  all runs, to compare: {runs_url(urls[0])}", soft_wrap=True)


def _table(report: Report, wide: bool) -> Table:
    """`wide`: with whole addresses; else with the start of the run's id, to click where the terminal can."""
    table = Table(title="rlhf", title_justify="left")
    for heading in ("stage", "result", "seconds", "main figure", "MLflow run"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left", overflow="fold")
    for row in report:
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        shown = row.url if wide else row.url.rpartition("/")[2][:8]
        link = Text(shown, style=f"link {row.url}" if row.url else "")
        table.add_row(row.stage, Text(row.status, style=COLOURS[row.status]), seconds, row.figure, link)
    return table


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    """Pairs, the first of each in a column of its own. Text is no markup."""
    grid = Table.grid(padding=(0, 2))
    for _ in range(2):
        grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(Text(f"  {name}"), Text(text))
    return grid


def _answers(sample: dict[str, Any]) -> Table:
    table = Table(title="One held-out prompt, answered by each", title_justify="left", show_lines=True)
    for model in ("base", "sft", "policy"):
        table.add_column(model, ratio=1, overflow="fold")
    table.caption = Text(f"prompt: {sample['prompt']}")
    table.caption_justify = "left"
    table.add_row(*(Text(sample[model].strip()) for model in ("base", "sft", "policy")))
    return table


_QUICK = """
A quick run: it shows that everything works here. So little training says nothing about quality: the figures and answers
above mean nothing. Nothing was registered; params.yaml, data and models are as they were.

What comes next
  make run       the same with params.yaml as it stands
  .rlhf/quick    what this run made, data/reports/report.html among it; remove it whenever you like"""


def _next(report: Report, verdict: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(command or file, what it is for): what works as things stand after this run."""
    steps = [(row["command"], row["what"]) for row in verdict["next"]] if verdict else []
    if done(report, "report"):
        steps.append(("data/reports/report.html", "all of this run on one page, for any browser"))
    if done(report, "evaluate") and _committed(METRICS):
        steps.append(("make compare A=HEAD", "this run beside the last commit's"))
    return [
        *steps,
        ("make ui", "MLflow and Prefect in the browser (the links above work while it runs)"),
        (". .venv/bin/activate", "then `dvc metrics show` (all figures), `dvc plots show` (the curves, as a page)"),
        ("edit params.yaml", "and `make run` again: only what depends on the change runs"),
    ]


def _committed(path: Path) -> bool:
    found = subprocess.run(["git", "cat-file", "-e", f"HEAD:./{path}"], capture_output=True, check=False)
    return found.returncode == 0
