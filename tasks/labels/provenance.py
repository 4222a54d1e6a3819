"""Which labels made this model: the files and their hashes, how many judgments of whom, and all that lies between.

    python -m tasks.lineage models:/policy@candidate

Everything follows from the hashes that MLflow recorded. What is counted is the content of those hashes, from DVC's
cache or remote or from git, whatever lies in the folder today; what cannot be had any more is named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from ruamel.yaml import YAML

from tasks.ancestry import Recorded, Store, inside, lineage, literal, stages_at
from tasks.datasets import AnyRow, Demonstration, Ranking, Samples, Vote, prompt_id, read_rows
from tasks.labels.judgments import SIMULATED, JudgedRanking, WrittenDemonstration, item_id, standing
from tasks.lineage import StageSpec
from tasks.register import find_version
from tasks.registry import COMPANIONS, resolve
from tasks.stage import UserError
from tasks.tracking import connect, masked, mlflow_told, tracking_uri

DEMONSTRATIONS = "data/collected/demonstrations"
MODELS = "data/models"
SAMPLES = "data/collected/samples"
RANKINGS = "data/collected/rankings"
WRITTEN = "data/labels/demonstrations.jsonl"
JUDGED = "data/labels/rankings.jsonl"
VOTES = "data/labels/arena.jsonl"
SETTINGS = ("demonstrate.", "rank.", "labelers", "sample.", "reward.label_share", "base.")  # what is shown of params

Kind = Literal["human", "simulated", "recorded"]


@dataclass(frozen=True)
class Count:
    """What became of one labeler's judgments. None: cannot be told any more."""

    job: str  # the stage that reads them
    kind: Kind
    labeler: str
    source: str  # the file that they stand in, or the stage that made them
    used: int | None
    held_out: int | None = None  # of those that are used, kept out of reward training, to measure the model by
    superseded: int | None = 0  # the same labeler said something else of the same item later
    skipped: int | None = 0
    left_out: int | None = 0  # by the parameter leave_out
    other: int | None = 0  # of prompts or outputs that this model was not made from, or not asked for


@dataclass(frozen=True)
class File:
    """Something that no stage made."""

    path: str
    md5: str
    holds: str  # "12 lines", "3 files", or "" where nobody knows
    files: dict[str, str] = field(default_factory=dict)  # of a folder: {file: md5}


@dataclass(frozen=True)
class Made:
    stage: str
    run: str  # in MLflow
    commit: str
    dirty: bool  # it ran beside uncommitted changes
    outs: dict[str, str]
    versions: dict[str, str]  # {out: the registered version that it is}


@dataclass
class Provenance:
    version: str
    aliases: list[str]
    path: str
    md5: str
    commit: str
    labels: list[Count] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)  # md5, prompts, outputs
    stages: list[Made] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


def provenance(text: str) -> Provenance:
    """Of the version that `policy/3` or `models:/policy@candidate` names."""
    client = connect()
    version = resolve(client, text, ("policy", *COMPANIONS))
    name, tags = f"{version.name}/{version.version}", version.tags
    if not {"dvc.path", "dvc.md5"} <= tags.keys():
        raise UserError(f"{name} does not say which data it is (dvc.path, dvc.md5): this pipeline did not register it.")
    repository = _repository()
    store = Store(repository)
    aliases = {alias: str(number) for alias, number in dict(client.get_registered_model(version.name).aliases).items()}
    found = Provenance(
        version=name,
        aliases=sorted(alias for alias, number in aliases.items() if number == str(version.version)),
        path=tags["dvc.path"],
        md5=tags["dvc.md5"],
        commit=tags.get("git.commit", ""),
    )
    specs, known = stages_at(repository, found.commit)
    if not known:
        found.lost.append(
            f"the commit {found.commit or 'of the version'} is not in this clone (`git fetch --all`): the stages are "
            "those of today's dvc.yaml"
        )
    runs = lineage(client, found.path, found.md5, specs, store, found.lost)
    for run in runs:
        if run.stage in READERS:
            found.labels += READERS[run.stage](run, Content(store, found.lost))
        if SAMPLES in run.outs:
            found.samples = samples(run.outs, Content(store, found.lost))
        found.settings |= {key: value for key, value in run.params.items() if key.startswith(SETTINGS)}
        registered = {
            out: find_version(client, Path(out).name, md5) for out, md5 in run.outs.items() if inside(out, MODELS)
        }
        versions = {out: f"{Path(out).name}/{number}" for out, number in registered.items() if number}
        found.stages.append(Made(run.stage, run.run_id, run.commit, run.dirty, run.outs, versions))
    found.files = beginnings(runs, specs, Content(store, found.lost))
    return found


def _repository() -> Path:
    done = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise UserError(f"{Path.cwd()} is in no git repository: run it in the pipeline's.")
    return Path(done.stdout.strip())


# ---------------------------------------------------------------------------------------------------------------------
# Whose labels


@dataclass(frozen=True)
class Content:
    """Rows by the hash that a stage recorded. Where they cannot be had, `lost` says so."""

    store: Store
    lost: list[str]

    def rows(self, hashes: dict[str, str], path: str, row_type: type[AnyRow]) -> list[AnyRow] | None:
        """hashes: of the run's inputs or outs; path: one of them, or a file within one."""
        if not any(inside(path, one) for one in hashes):
            self.lost.append(f"{path}: the record does not say which it was")
            return None
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = self.store.put_within(hashes, path, Path(folder))
                return read_rows(file, row_type, may_be_empty=True)
        except UserError as error:
            told = str(error).splitlines()[0]
            if told not in self.lost:
                self.lost.append(told)
            return None


def written_demonstrations(run: Recorded, content: Content) -> list[Count]:
    labeler = run.params.get("demonstrate.labeler", "")
    taken = content.rows(run.outs, f"{DEMONSTRATIONS}/demonstrations.jsonl", Demonstration)
    people = content.rows(run.deps, WRITTEN, WrittenDemonstration) if WRITTEN in run.deps else []
    answers: set[tuple[str, str, str | None]] | None = set()  # what the stage took of people
    if labeler == "human":
        answers = None if taken is None else {(item_id(row.prompt), row.labeler, row.response) for row in taken}
    counts = of_people(
        "demonstrate",
        WRITTEN,
        people or [],
        leave_out=literal(run.params.get("demonstrate.human.leave_out", "[]")),
        used=None if answers is None else lambda row: (row.item, row.labeler, row.response) in answers,
    )
    if labeler == "human" and people is not None:
        taken = [row for row in taken or [] if row.labeler.startswith(SIMULATED)]
    source = "data/prepared/demonstrations/sft.jsonl" if labeler == "recorded" else WRITTEN
    return counts + of_stage("demonstrate", labeler, source, [(row.labeler, False) for row in taken or []])


def judged_rankings(run: Recorded, content: Content) -> list[Count]:
    labeler = run.params.get("rank.labeler", "")
    taken = content.rows(run.outs, f"{RANKINGS}/rankings.jsonl", Ranking)
    people = content.rows(run.deps, JUDGED, JudgedRanking) if JUDGED in run.deps else []
    votes = (content.rows(run.deps, VOTES, Vote) if VOTES in run.deps else []) or []
    of_held_out_labelers = f"{RANKINGS}/held_out_labelers.jsonl"  # since there are any
    kept_apart = []
    if content.store.hash_within(run.outs, of_held_out_labelers):
        kept_apart = content.rows(run.outs, of_held_out_labelers, Ranking) or []
    apart = set(literal(run.params.get("rank.human.held_out_labelers", "[]")))
    sides = {row.id: row.held_out for row in [*(taken or []), *kept_apart]}  # all rankings of a prompt are on one side
    counts = []
    for name, rows in _by_labeler(votes).items():
        seen = None if taken is None else [row for row in rows if row.id in sides]
        held_out = None if seen is None else sum(name in apart or sides[row.id] for row in seen)
        counts.append(Count("rank", "human", name, VOTES, None if seen is None else len(seen), held_out))
    ranked: set[str] | None = set()  # the items that people were asked about
    if labeler == "human":
        sampled = content.rows(run.deps, f"{SAMPLES}/samples.jsonl", Samples)
        ranked = None if sampled is None else {item_id(row.prompt, row.responses, row.ended) for row in sampled}
    counts += of_people(
        "rank",
        JUDGED,
        people or [],
        leave_out=literal(run.params.get("rank.human.leave_out", "[]")),
        used=None if ranked is None else lambda row: row.item in ranked,
        held_out=lambda row: row.labeler in apart or sides.get(prompt_id(row.prompt), False),
    )
    others = [(row, row.held_out) for row in _without(taken or [], votes)]
    others += [(row, True) for row in _without(kept_apart, votes)]
    if labeler == "human" and people is not None:
        others = [(row, held_out) for row, held_out in others if row.labeler.startswith(SIMULATED)]
    source = "data/prepared/rankings" if labeler == "recorded" else JUDGED
    return counts + of_stage("rank", labeler, source, [(row.labeler, held_out) for row, held_out in others])


READERS = {"demonstrate": written_demonstrations, "rank": judged_rankings}


def of_people(
    job: str,
    source: str,
    rows: Sequence[Any],
    leave_out: Iterable[str],
    used: Callable[[Any], bool] | None,
    held_out: Callable[[Any], bool] | None = None,
) -> list[Count]:
    """Each line of the file counts once. used: whether a judgment that holds is of what was asked for; None: nobody
    knows. held_out: whether one that is used was kept out of training."""
    without = set(leave_out)
    stands = {id(row) for row in standing(rows)}
    counts = []
    for labeler, own in _by_labeler(rows).items():
        hold = [row for row in own if id(row) in stands and labeler not in without]
        said = [row for row in hold if row.skipped is None]
        taken = None if used is None else [row for row in said if used(row)]
        counts.append(
            Count(
                job,
                "human",
                labeler,
                source,
                used=None if taken is None else len(taken),
                held_out=None if taken is None or held_out is None else sum(map(held_out, taken)),
                superseded=0 if labeler in without else len(own) - len(hold),
                skipped=len(hold) - len(said),
                left_out=len(own) if labeler in without else 0,
                other=None if taken is None else len(said) - len(taken),
            )
        )
    return counts


def of_stage(job: str, labeler: str, source: str, rows: Iterable[tuple[str, bool]]) -> list[Count]:
    """Labels as the stage wrote them. rows: (labeler, whether it is held out). Of people this is all that there is
    where their file is lost."""
    rows = list(rows)
    held_out = Counter(name for name, apart in rows if apart)
    counts = []
    for name, used in sorted(Counter(name for name, _ in rows).items()):
        apart = held_out[name] if job == "rank" else None
        if labeler == "recorded":
            counts.append(Count(job, "recorded", name, source, used, apart))
        elif labeler == "simulated" or name.startswith(SIMULATED):
            counts.append(Count(job, "simulated", name, f"stage {job}", used, apart))
        else:
            counts.append(Count(job, "human", name, source, used, apart, *[None] * 4))
    return counts


def _by_labeler(rows: Sequence[AnyRow]) -> dict[str, list[AnyRow]]:
    found: dict[str, list[AnyRow]] = {}
    for row in rows:
        found.setdefault(row.labeler, []).append(row)  # type: ignore[attr-defined]
    return dict(sorted(found.items()))


def _without(rankings: Sequence[Ranking], votes: Sequence[Vote]) -> list[Ranking]:
    """The rankings that are no votes of the arena, which the stage appends to them."""

    def key(row: Ranking) -> str:
        return json.dumps([row.id, row.responses, row.ranks, row.labeler])

    left = Counter(map(key, votes))
    found = []
    for row in rankings:
        if left[key(row)] > 0:
            left[key(row)] -= 1
        else:
            found.append(row)
    return found


def samples(outs: dict[str, str], content: Content) -> dict[str, Any]:
    rows = content.rows(outs, f"{SAMPLES}/samples.jsonl", Samples)
    told: dict[str, Any] = {"path": SAMPLES, "md5": outs[SAMPLES]}
    return told | {
        "prompts": None if rows is None else len(rows),
        "outputs": None if rows is None else sum(len(row.responses) for row in rows),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Where it begins


def beginnings(runs: Sequence[Recorded], specs: dict[str, StageSpec], content: Content) -> list[File]:
    """What the stages read and no stage writes: raw data, labels."""
    outs = [out for spec in specs.values() for out in spec.outs]
    read = {(path, md5): run for run in runs for path, md5 in run.deps.items()}
    found = []
    for (path, md5), run in sorted(read.items(), key=lambda one: one[0]):
        if any(inside(path, out) or inside(out, path) for out in outs):
            continue
        if md5.endswith(".dir"):
            try:
                files = folder_files(path, md5, run.commit, content.store)
            except UserError as error:
                files = None
                content.lost.append(str(error))
            else:
                if files is None:
                    content.lost.append(f"{path} ({md5}): which files it held is neither in DVC's store nor in git")
            found.append(File(path, md5, "" if files is None else _number(len(files), "file"), files or {}))
        else:
            found.append(File(path, md5, lines_of(path, md5, content)))
    return found


def lines_of(path: str, md5: str, content: Content) -> str:
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = content.store.put_within({path: md5}, path, Path(folder))
            return _number(file.read_bytes().count(b"\n"), "line")
    except UserError as error:
        told = str(error).splitlines()[0]
        if told not in content.lost:
            content.lost.append(told)
        return ""


def folder_files(path: str, md5: str, commit: str, store: Store) -> dict[str, str] | None:
    """{file: md5} of a folder with this hash: as DVC keeps it, or else as git has it at the commit, if that is it."""
    if listed := store.listing(md5, path):
        return listed
    tree = ["git", "ls-tree", "-r", "--full-tree", "--name-only", "-z", commit, "--", path]
    names = subprocess.run(tree, cwd=store.repository, capture_output=True, encoding="utf-8", check=False).stdout
    files: dict[str, str] = {}
    for name in filter(None, names.split("\0")):
        shown = subprocess.run(
            ["git", "show", f"{commit}:{name}"], cwd=store.repository, capture_output=True, check=True
        )
        within = name.removeprefix(path + "/")
        files[within] = hashlib.md5(shown.stdout, usedforsecurity=False).hexdigest()
        if name.endswith(".dvc"):
            for out in YAML(typ="safe").load(shown.stdout)["outs"]:
                target = str(Path(within).parent / out["path"])
                if out["md5"].endswith(".dir"):
                    inner = store.listing(out["md5"], f"{path}/{target}")
                    files |= {f"{target}/{file}": digest for file, digest in inner.items()}
                else:
                    files[target] = out["md5"]
    # DVC's hash of a folder is that of its listing
    listing = json.dumps([{"md5": files[name], "relpath": name} for name in sorted(files)], sort_keys=True)
    same = hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() == md5.removesuffix(".dir")
    return files if same else None


# ---------------------------------------------------------------------------------------------------------------------
# Telling it


def shown(found: Provenance, console: Console) -> None:
    alias = f" ({', '.join(found.aliases)})" if found.aliases else ""
    console.print(f"[bold]{found.version}[/]{alias}: {found.path} {found.md5}, commit {found.commit[:8] or '?'}\n")

    table = Table(title="labels", title_justify="left")
    for column in ("job", "kind", "labeler", "from"):
        table.add_column(column, overflow="fold")
    for column in ("used", "held out", "superseded", "skipped", "left out", "other"):
        table.add_column(column, justify="right", overflow="fold")
    for one in found.labels:
        numbers = (one.used, one.held_out, one.superseded, one.skipped, one.left_out, one.other)
        told = ["?" if number is None else str(number) for number in numbers]
        if one.job == "demonstrate":
            told[1] = ""
        table.add_row(one.job, one.kind, escape(one.labeler), one.source, *told)
    console.print(table)
    for line in totals(found.labels):
        console.print(line)
    console.print()

    table = Table(title="where it begins", title_justify="left")
    for column in ("path", "hash", "holds"):
        table.add_column(column, overflow="fold")
    for file in found.files:
        table.add_row(escape(file.path), file.md5, file.holds)
        for name, md5 in list(file.files.items())[:FILES_SHOWN]:
            table.add_row(f"  {escape(name)}", md5, "")
        if len(file.files) > FILES_SHOWN:
            table.add_row(f"  and {len(file.files) - FILES_SHOWN} more (--json has all)", "", "")
    console.print(table)
    if found.samples:
        counts = (found.samples[key] for key in ("prompts", "outputs"))
        prompts, outputs = ("?" if count is None else count for count in counts)
        console.print(f"samples: {outputs} outputs to {prompts} prompts, {SAMPLES} {found.samples['md5']}\n")

    table = Table(title="made by", title_justify="left")
    for column in ("stage", "MLflow run", "commit", "wrote", "hash"):
        table.add_column(column, overflow="fold")
    for made in found.stages:
        commit = made.commit[:8] + (" + uncommitted changes" if made.dirty else "")
        outs = [(out, md5) for out, md5 in made.outs.items() if not out.startswith("data/reports/")]
        for number, (out, md5) in enumerate(outs):
            first = (made.stage, made.run[:8], commit) if number == 0 else ("", "", "")
            table.add_row(*first, f"{out} ({made.versions[out]})" if out in made.versions else out, md5)
    console.print(table)
    for key, value in sorted(found.settings.items()):
        if key == "labelers" and not any(one.kind == "simulated" for one in found.labels):
            continue  # the simulated ones, of whom nobody was asked
        console.print(f"{key}: {value}", markup=False)
    for line in found.lost:
        console.print(f"not to be had any more: {line}", markup=False, style="yellow")


FILES_SHOWN = 10


def totals(labels: Sequence[Count]) -> list[str]:
    """`rank took 12 by 3 human labelers, 4 by 1 simulated labeler`, one line a job."""
    found = []
    for job in dict.fromkeys(one.job for one in labels):
        parts = []
        for kind in ("human", "simulated", "recorded"):
            own = [one for one in labels if (one.job, one.kind) == (job, kind) and one.used != 0]
            if own:
                used = (
                    "an unknown number" if any(one.used is None for one in own) else sum(one.used or 0 for one in own)
                )
                people = len({one.labeler for one in own})
                parts.append(f"{used} by {people} {kind} labeler{'s' * (people > 1)}")
        found.append(f"{job} took {', '.join(parts) or 'nothing'}")
    return found


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.lineage", description="Which labels made this model, and what lies between."
    )
    parser.add_argument("version", help="models:/policy@candidate, policy/3, sft/2, reward@champion")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    try:
        uri = tracking_uri()
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///").partition("?")[0]).exists():
            raise UserError(
                f"there is no MLflow at {masked(uri)}: nothing was run here. `make run` makes a policy; for a server "
                "elsewhere set MLFLOW_TRACKING_URI."
            )
        with mlflow_told():
            found = provenance(arguments.version)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        shown(found, Console(width=None if sys.stdout.isatty() else 200, highlight=False))
    return 0
