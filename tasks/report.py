"""Stage `report`: everything that a reader wants of a run, in one page without network: data/reports/report.html.

`python -m tasks.run report`. The same inputs give the same bytes: nothing in it has a date. What changed since the last
run is told against the report that git has at HEAD.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tasks import figures, gates
from tasks.datasets import SideBySide, read_figures, read_rows
from tasks.labels.whose import whose_labels
from tasks.lineage import hash_path
from tasks.stage import Stage
from tasks.tracking import flat_params

SHOWN = 20


def run(stage: Stage) -> None:
    names = ("prepare", "demonstrate", "sft", "sample", "rank", "reward", "ppo", "evaluation", "judge")
    reports = {
        name: read_figures(stage.dep(f"data/reports/{name}/metrics.json").read_text(encoding="utf-8")) for name in names
    }
    tables = {
        **{name: table(stage.dep(f"data/reports/evaluation/{name}.csv")) for name in ("slices", "overoptimisation")},
        **{f"reward {name}": table(stage.dep(f"data/reports/reward/{name}.csv")) for name in REWARD_TABLES},
        "ppo": table(stage.dep("data/reports/ppo/history.csv")),
    }
    rows = read_rows(stage.dep("data/reports/evaluation/samples.jsonl"), SideBySide)
    made = [  # in the order in which one was made from the other
        ("demonstrations of labelers", stage.dep("data/collected/demonstrations")),
        ("SFT model", stage.dep("data/models/sft")),
        ("its samples", stage.dep("data/collected/samples")),
        ("labelers' rankings of them", stage.dep("data/collected/rankings")),
        ("reward model", stage.dep("data/models/reward")),
        ("policy", stage.dep("data/models/policy")),
    ]
    drawn = draw(tables, rows, int(reports["ppo"]["ppo"]["kept_update"]))
    registered = json.loads(stage.dep("data/reports/registered.json").read_text(encoding="utf-8"))
    facts = {
        "parameters": flat_params(stage.params, stage.spec.params),
        "figures": main_figures(reports),
    }
    page = render(
        labels=whose_labels(reports),
        reports=reports,
        evaluation=reports["evaluation"],
        verdict=registered["verdict"],
        figures=drawn,
        gates=[gate_of(name, registered["gates"][name]) for name in gates.FIGURES if name in registered["gates"]],
        samples=[marked(row) for row in spread(rows)],
        judge_of_samples=judge_of(rows),
        made=[(what, path.relative_to(stage.root), hash_path(path)) for what, path in made],
        changes=changes(facts, committed(stage.root)),
        facts=facts,
    )
    stage.out("data/reports/report.html").write_text(page, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "figures"
        pictures.mkdir()
        for name, picture in drawn.items():
            (pictures / f"{name}.svg").write_text(picture, encoding="utf-8")
        (Path(folder) / "report.html").write_text(page, encoding="utf-8")
        stage.tracker.artifact(pictures)
        stage.tracker.artifact(Path(folder) / "report.html")


REWARD_TABLES = ("slices", "reliability", "probes", "scores")


def gate_of(name: str, row: Mapping[str, Any]) -> gates.Gate:
    """As `register` wrote it down."""
    side: Literal["at least", "at most"] = "at least" if "at_least" in row else "at most"
    limit = row[side.replace(" ", "_")]
    return gates.Gate(name, side, limit, row["value"], row.get("by", ""), row.get("open", ""))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw(tables: Mapping[str, list[dict[str, str]]], rows: list[SideBySide], kept: int) -> dict[str, Markup]:
    """The pictures by name, as SVG."""
    scores: dict[str, list[float]] = {}
    for row in tables["reward scores"]:
        scores.setdefault(row["source"], []).append(float(row["score"]))
    scores |= {f"{model} answers": [row.scores[f"score.{model}"] for row in rows] for model in ("sft", "policy")}
    gain, judge = ("gain", "gold score") if judge_of(rows) == "gold" else ("score_gain", "reward-model score")
    made = {
        "overoptimisation": figures.over_optimisation(tables["overoptimisation"], kept),
        "slices": figures.bars(tables["slices"], "slice", gain, f"gain of the policy over SFT, {judge}"),
        "ppo": figures.curves(tables["ppo"], "update", ("score", "kl", "entropy", "response_length")),
        "accuracy": figures.bars(tables["reward slices"], "slice", "accuracy", "agrees with the labeler", zero=0.5),
        "reliability": figures.reliability(tables["reward reliability"]),
        "probes": figures.bars(tables["reward probes"], "probe", "change", "change of the score"),
        "scores": figures.score_distributions(scores),
    }
    return {name: Markup(figures.svg(figure)) for name, figure in made.items()}  # our own drawing


def judge_of(rows: list[SideBySide]) -> str:
    """What all answers can be compared by: `gold` where every prompt has a gold score, else `score`."""
    return "gold" if all("gold.policy" in row.scores for row in rows) else "score"


def spread(rows: list[SideBySide]) -> list[SideBySide]:
    """So many over the whole range, from where the policy lost most to where it won most."""
    judge = judge_of(rows)
    ordered = sorted(rows, key=lambda row: row.scores[f"{judge}.policy"] - row.scores[f"{judge}.sft"])
    count = min(SHOWN, len(ordered))
    return [ordered[round(place * (len(ordered) - 1) / max(1, count - 1))] for place in range(count)]


def marked(row: SideBySide) -> dict[str, Any]:
    """The SFT model's and the policy's answer with what one has and the other has not between marks."""
    words: list[list[str]] = [re.findall(r"\S+\s*", text) for text in (row.sft, row.policy)]
    before, after = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(a=words[0], b=words[1], autojunk=False).get_opcodes():
        old, new = escape("".join(words[0][a:b])), escape("".join(words[1][c:d]))
        before.append(old if kind == "equal" or not old else Markup("<del>{}</del>").format(old))
        after.append(new if kind == "equal" or not new else Markup("<ins>{}</ins>").format(new))
    return {"row": row, "sft": Markup("").join(before), "policy": Markup("").join(after)}


def main_figures(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    names = (
        "gold.sft",
        "gold.policy",
        "gold.gain",
        "win_rate",
        "score_win_rate",
        "kl",
        "fluency.policy",
        "length.policy",
        "ended.policy",
    )
    found = {name: gates.figure_at(reports["evaluation"], name) for name in names}
    found |= {"reward.accuracy": gates.figure_at(reports["reward"], "reward.accuracy")}
    return {name: value for name, value in found.items() if value is not None}


def committed(root: Path) -> dict[str, Any]:
    """The facts of the report that git has at HEAD; {} where it has none."""
    shown = subprocess.run(
        ["git", "show", "HEAD:data/reports/report.html"], cwd=root, capture_output=True, encoding="utf-8", check=False
    )
    found = re.search(r'<script type="application/json" id="facts">(.*?)</script>', shown.stdout, re.DOTALL)
    facts: dict[str, Any] = json.loads(found[1]) if found else {}
    return facts


def changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, list[tuple[str, Any, Any]]]:
    """{"parameters": [(name, before, now)], "figures": ...} of what is not the same; {} without a report before."""
    if not before:
        return {}
    return {
        kind: [
            (name, before[kind].get(name), now[kind].get(name))
            for name in sorted(before[kind].keys() | now[kind].keys())
            if before[kind].get(name) != now[kind].get(name)
        ]
        for kind in ("parameters", "figures")
    }


def render(**content: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("report.html").render(**content)


def number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:#.3g}".rstrip(".") if isinstance(value, float) else str(value)
