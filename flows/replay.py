"""Make a registered policy again, and see whether it is the same to the bit: `python -m flows.replay policy/3`.

MLflow's record says by hash what each stage read and wrote, back to the raw data. In a workspace at the recorded commit
each stage runs again on the inputs that it had then, fetched by their hashes, and what it writes is compared with what
it wrote. Exit codes: 0 all the same, 1 something differs, 2 something to mend.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.workspace import Workspace, change_params, git, open_workspace
from tasks.lineage import StageSpec, environment, hash_path, load_stages, upstream
from tasks.params import load_params
from tasks.stage import UserError
from tasks.tracking import connect, flat_params, masked, mlflow_told, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MISSING = "?"


class Recorded(NamedTuple):
    """One stage run, as MLflow has it."""

    stage: str
    run_id: str
    commit: str
    dirty: bool
    deps: dict[str, str]  # path -> DVC hash, of data; code is in the commit
    outs: dict[str, str]
    params: dict[str, str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Compared:
    """One out of one stage."""

    stage: str
    out: str
    recorded: str
    now: str
    difference: str = ""  # where the first one stands

    @property
    def same(self) -> bool:
        return self.recorded == self.now


# ---------------------------------------------------------------------------------------------------------------------
# Lineage: which stage runs made it


def lineage(client: MlflowClient, path: str, md5: str, specs: dict[str, StageSpec], store: Store) -> list[Recorded]:
    """The stage runs behind an out, from the raw data on: each wrote, by hash, what the next one read."""
    parents = upstream(specs)
    maker = next((spec.name for spec in specs.values() if path in spec.outs), None)
    if maker is None:
        raise UserError(f"no stage of dvc.yaml writes {path}.")
    found: list[Recorded] = []
    wanted: dict[str, dict[str, str]] = {maker: {path: md5}}  # stage -> what it must have written
    for spec in reversed(list(specs.values())):  # a stage comes after all that read from it
        if spec.name not in wanted:
            continue
        run = made_by(client, spec.name, wanted[spec.name], store)
        found.insert(0, run)
        for parent in parents[spec.name]:
            read = {dep: md5 for dep, md5 in run.deps.items() if any(inside(dep, out) for out in specs[parent].outs)}
            if read:
                wanted.setdefault(parent, {}).update(read)
    return found


def inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def made_by(client: MlflowClient, stage: str, hashes: dict[str, str], store: Store) -> Recorded:
    """The newest finished run of the stage that wrote all these; a file within an out is looked up in its listing."""
    experiment = client.get_experiment_by_name("rlhf")
    query = f"tags.`dvc.stage` = '{stage}' and attributes.status = 'FINISHED'"
    runs = client.search_runs([experiment.experiment_id], query, max_results=1000) if experiment else []
    for run in runs:
        recorded = recorded_in(run)
        if all(store.hash_within(recorded.outs, path) == md5 for path, md5 in hashes.items()):
            return recorded
    told = ", ".join(f"{path} ({md5})" for path, md5 in hashes.items())
    raise UserError(
        f"MLflow at {masked(tracking_uri())} has no finished run of `{stage}` that wrote {told}. Where MLflow missed "
        "what was logged, `python -m tasks.tracking replay` sends it."
    )


def recorded_in(run: Run) -> Recorded:
    tags: dict[str, str] = run.data.tags

    def under(prefix: str) -> dict[str, str]:
        return {key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)}

    return Recorded(
        tags["dvc.stage"],
        run.info.run_id,
        tags.get("git.commit", ""),
        tags.get("git.dirty") == "true",
        under("dvc.dep."),
        under("dvc.out."),
        dict(run.data.params),
        under("env."),
    )


class Store:
    """DVC's objects by hash: its cache, then its remotes; small files that DVC does not keep, from git."""

    def __init__(self, repository: Path) -> None:
        from tasks.register import dvc_stores

        self.repository = repository
        self.places = dvc_stores(repository)
        self._listings: dict[str, dict[str, str]] = {}

    def hash_within(self, outs: dict[str, str], path: str) -> str:
        """The hash of a path that is one of the outs, or lies within one; else ""."""
        for out, md5 in outs.items():
            if path == out:
                return md5
            if inside(path, out) and md5.endswith(".dir"):
                return self._listing(md5, out).get(path.removeprefix(out + "/"), "")
        return ""

    def _listing(self, md5: str, path: str) -> dict[str, str]:
        from tasks.registered_model import fetch_object

        if md5 not in self._listings:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "listing.json"
                try:
                    fetch_object(md5, path, self.places, file)
                except FileNotFoundError:
                    return {}
                except OSError as error:
                    raise UserError(str(error)) from None
                self._listings[md5] = {entry["relpath"]: entry["md5"] for entry in json.loads(file.read_text())}
        return self._listings[md5]

    def put(self, path: str, md5: str, target: Path) -> None:
        """The file or folder with this hash, to a place where nothing is."""
        from tasks.registered_model import fetch, fetch_object

        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if md5.endswith(".dir"):
                target.mkdir()
                fetch(md5, path, self.places, target)
            else:
                fetch_object(md5, path, self.places, target)
        except OSError as error:
            if md5.endswith(".dir") or not self._from_git(path, md5, target):
                raise UserError(str(error)) from None

    def _from_git(self, path: str, md5: str, target: Path) -> bool:
        """Reports are in git, on the branch of their run."""
        for commit in git(self.repository, "log", "--all", "--format=%H", "--", path).split():
            shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=self.repository, capture_output=True)  # noqa: PLW1510
            if hashlib.md5(shown.stdout, usedforsecurity=False).hexdigest() == md5:
                target.write_bytes(shown.stdout)
                return True
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Running it again


def replay(version: str, only: str | None, console: Console) -> list[Compared]:
    """Run again what made the version, or one stage of it; the outs that it had, beside those that it has now."""
    from tasks.registry import resolve

    client = connect()
    tags = resolve(client, version).tags
    repository = Path(git(Path(), "rev-parse", "--show-toplevel"))
    store = Store(repository)
    found: list[Compared] = []
    with open_workspace(f"replay-{uuid.uuid4().hex[:8]}", tags["git.commit"], adopt=False) as workspace:
        try:
            runs = lineage(client, tags["dvc.path"], tags["dvc.md5"], load_stages(workspace.path), store)
            if only is not None and only not in [run.stage for run in runs]:
                raise UserError(f"`{only}` is none of the stages that made it: {', '.join(run.stage for run in runs)}.")
            for run in runs:
                if only in (None, run.stage):
                    console.print(f"[cyan]{run.stage}[/] as run {run.run_id[:8]} at {run.commit[:8]} ...")
                    again(run, workspace, store, console)
                    found += compare(run, workspace, store)
            console.print(table(found), environments(runs if only is None else [r for r in runs if r.stage == only]))
        finally:
            workspace.remove()
            git(repository, "branch", "--quiet", "-D", workspace.branch)
    return found


def again(run: Recorded, workspace: Workspace, store: Store, console: Console) -> None:
    """One stage on its recorded commit, parameters and inputs."""
    if run.dirty:
        console.print(
            f"[yellow]note:[/] `{run.stage}` ran beside uncommitted changes; "
            f"the code of commit {run.commit[:8]} may differ."
        )
    git(workspace.path, "checkout", "--quiet", "--force", "--detach", run.commit)
    restore_params(run, workspace, console)
    workspace.fetch_within(run.deps)
    for dep, md5 in run.deps.items():
        place = workspace.path / dep
        if place.exists() and hash_path(place) == md5:
            continue
        clear(place)
        store.put(dep, md5, place)
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{workspace.path / '.rlhf/replay.db'}",  # not part of the record
        "RLHF_PIPELINE_ID": "replay",
    }
    (workspace.path / ".rlhf").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "tasks.run", run.stage], cwd=workspace.path, env=environment, check=False
    )
    if done.returncode:
        raise UserError(f"`{run.stage}` failed; see above.")


def restore_params(run: Recorded, workspace: Workspace, console: Console) -> None:
    """Parameters that were not committed when it ran are taken from the record."""
    spec = load_stages(workspace.path)[run.stage]
    now = flat_params(load_params(workspace.path / "params.yaml"), spec.params)
    other = {key: value for key, value in run.params.items() if key in now and now[key] != value}
    if other:
        told = ", ".join(f"{key}={value}" for key, value in sorted(other.items()))
        console.print(f"[yellow]note:[/] parameters from the record, not from the commit: {told}")
        change_params(workspace.path / "params.yaml", {key: literal(value) for key, value in other.items()})


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def clear(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare(run: Recorded, workspace: Workspace, store: Store) -> list[Compared]:
    found = []
    for out, md5 in run.outs.items():
        place = workspace.path / out
        now = hash_path(place) if place.exists() else MISSING
        found.append(Compared(run.stage, out, md5, now, "" if now == md5 else first_difference(out, md5, place, store)))
    return found


def first_difference(out: str, md5: str, place: Path, store: Store) -> str:
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        try:
            store.put(out, md5, before)
        except UserError:
            return "what it wrote then is in no store: cannot say where"
        if before.is_file():
            return difference_of_files(before, place)
        names = sorted(
            {str(file.relative_to(root)) for root in (before, place) for file in root.rglob("*") if file.is_file()}
        )
        for name in names:
            old, new = before / name, place / name
            if not (old.exists() and new.exists()):
                return f"{name}: only {'then' if old.exists() else 'now'}"
            if old.read_bytes() != new.read_bytes():
                return f"{name}: {difference_of_files(old, new)}"
    return "the listing alone"


def difference_of_files(old: Path, new: Path) -> str:
    if old.suffix == ".safetensors" or new.suffix == ".safetensors":
        return difference_of_tensors(old, new)
    lines = [file.read_bytes().splitlines() for file in (old, new)]
    for number, (one, other) in enumerate(zip(*lines, strict=False), start=1):
        if one != other:
            return f"line {number}: {shown(one)} then, {shown(other)} now"
    return f"{len(lines[0])} lines then, {len(lines[1])} now"


def shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return text if len(text) <= 60 else text[:57] + "..."


def difference_of_tensors(old: Path, new: Path) -> str:
    """The first tensor that differs, by how much at most, and how many differ in all."""
    from safetensors.torch import load_file

    before, after = load_file(old), load_file(new)
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or before[name].shape != after[name].shape:
            return f"{name}: not in both, or of another shape"
    other = [name for name in sorted(before) if not before[name].equal(after[name])]
    if not other:
        return "the tensors are the same, the header is not"
    largest = (before[other[0]].double() - after[other[0]].double()).abs().max().item()
    return f"{other[0]} by up to {largest:.3g}; {len(other)} of {len(before)} tensors differ"


def table(found: list[Compared]) -> Table:
    shown = Table(title="replay", title_justify="left")
    for column in ("stage", "out", "recorded", "now", "same", "first difference"):
        shown.add_column(column)
    for row in found:
        verdict = Text("yes", style="green") if row.same else Text("no", style="bold red")
        shown.add_row(row.stage, row.out, row.recorded[:12], row.now[:12], verdict, row.difference)
    return shown


def environments(runs: list[Recorded]) -> Table:
    shown = Table(title="environment", title_justify="left")
    for column in ("", "recorded", "now"):
        shown.add_column(column)
    now = environment()
    for key in dict.fromkeys([*now, *(key for run in runs for key in run.environment)]):
        before = ", ".join(sorted({run.environment.get(key, MISSING) for run in runs}))
        present = now.get(key, MISSING)
        shown.add_row(key, before, Text(present, style="" if before == present else "yellow"))
    return shown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.replay", description=__doc__.splitlines()[0])
    parser.add_argument("version", help="policy/3, or policy@champion")
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone, on the inputs that it had")
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        with mlflow_told():
            found = replay(arguments.version, arguments.only, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differ = [row for row in found if not row.same]
    console.print(f"{len(found) - len(differ)} of {len(found)} outs are the same to the bit.")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
