"""Make a registered policy again, and see whether it is the same to the bit: `python -m flows.replay policy/3`.

MLflow's record says by hash what each stage read and wrote, back to the raw data. In a workspace at the recorded commit
each stage runs again on the inputs that it had then, fetched by their hashes, and what it writes is compared with what
it wrote. Exit codes: 0 all the same, 1 something differs, 2 something to mend.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.workspace import Workspace, change_params, git, open_workspace
from tasks.ancestry import Recorded, Store, lineage, literal
from tasks.lineage import environment, hash_path, load_stages
from tasks.params import load_params
from tasks.stage import UserError
from tasks.tracking import connect, flat_params, mlflow_told

MISSING = "?"


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
        shown.add_column(column, overflow="fold")
    for row in found:
        verdict = Text("yes", style="green") if row.same else Text("no", style="bold red")
        shown.add_row(row.stage, row.out, row.recorded[:12], row.now[:12], verdict, row.difference)
    return shown


def environments(runs: list[Recorded]) -> Table:
    shown = Table(title="environment", title_justify="left")
    for column in ("", "recorded", "now"):
        shown.add_column(column, overflow="fold")
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
