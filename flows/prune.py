"""Remove what scheduled runs leave behind: `python -m flows.prune [--gc]`.

Workspaces go when nobody works in them and they are old; branches `runs/ID` go when there are more than asked for.
With --gc, DVC's cache loses what no branch and no tag needs. What registered versions were made of, data and commits,
is on a branch of its own, `rlhf/registered`, so it stays.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from flows.waiting import waits_until
from flows.workspace import ALL, BRANCHES, WORKSPACES, Workspace, commit_of, git, held, identity
from tasks.ancestry import Store, lineage, stages_at
from tasks.stage import UserError
from tasks.tracking import connect, mlflow_told

KEPT = "rlhf/registered"


class Removed(NamedTuple):
    workspaces: list[str]
    branches: list[str]

    def __str__(self) -> str:
        return f"{len(self.workspaces)} workspaces, {len(self.branches)} branches"


def prune(keep_days: float, keep_branches: int, repository: Path = Path()) -> Removed:
    """Workspaces untouched for so many days, where no run waits for people; run branches but the newest so many and
    those of registered versions."""
    keep_on_branch(repository, registered(repository))
    return Removed(prune_workspaces(repository, keep_days), prune_branches(repository, keep_branches))


def prune_workspaces(repository: Path, keep_days: float) -> list[str]:
    repository = Path(git(repository, "rev-parse", "--show-toplevel"))
    removed = []
    root = repository / WORKSPACES
    for folder in sorted(root.glob("*/")):
        if time.time() - max(folder.stat().st_mtime, waits_until(folder)) < keep_days * 86400:
            continue  # of a run that waits for people's labels, too, until its time is up
        with contextlib.suppress(UserError), held(root, folder.name):
            Workspace(folder.name, folder, str(repository)).remove()
            removed.append(folder.name)
    for lock in root.glob("*.lock"):  # of workspaces that are gone
        if lock.stem != ALL and not (root / lock.stem).exists():
            with contextlib.suppress(UserError), held(root, lock.stem):
                lock.unlink()
    return removed


def prune_branches(repository: Path, keep: int) -> list[str]:
    listed = git(
        repository, "for-each-ref", "--sort=-committerdate", "--format=%(refname:short)", f"refs/heads/{BRANCHES}"
    )
    branches = listed.splitlines()
    worktrees = git(repository, "worktree", "list", "--porcelain")
    removed = []
    for branch in branches[keep:]:
        if f"branch refs/heads/{branch}\n" in worktrees + "\n":
            continue
        git(repository, "branch", "--quiet", "-D", branch)
        removed.append(branch)
    return removed


def collect_garbage(repository: Path) -> int:
    """`dvc gc` where it can hurt nobody; returns how many objects of registered versions it was told to keep."""
    root = Path(git(repository, "rev-parse", "--show-toplevel")) / WORKSPACES
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as idle:
        idle.enter_context(held(root, ALL))
        for lock in root.glob("*.lock"):
            if lock.stem != ALL:
                try:
                    idle.enter_context(held(root, lock.stem))  # what a run has made is on no branch yet
                except UserError as error:
                    raise UserError(f"{error} Garbage is collected when no run is active; nothing was.") from None
        kept = registered(repository)
        keep_on_branch(repository, kept)
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "gc", "--force", "--quiet", "--workspace", "--all-branches", "--all-tags"],
            cwd=repository,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            raise UserError(f"`dvc gc` failed: {done.stderr.strip()[-2000:]}")
    return len(kept.data)


class Kept(NamedTuple):
    """What registered versions need."""

    data: set[str]  # DVC's hashes: of the models, and of all that the policies were made from
    commits: set[str]  # of all the runs that made the policies


def registered(repository: Path) -> Kept:
    """Of every version in MLflow. UserError where the record of one has a gap: then nothing may be removed.

    Versions whose commit is unknown here are another repository's; of them the models alone are kept.
    """
    client, store = connect(), Store(repository)
    kept = Kept(set(), set())
    for version in client.search_model_versions():
        tags = version.tags
        kept.data.update(tags[key] for key in ("dvc.md5", "evaluation.samples") if tags.get(key))
        if version.name == "policy" and is_known(repository, tags.get("git.commit", "")):
            specs, _ = stages_at(repository, tags["git.commit"])
            runs = lineage(client, tags["dvc.path"], tags["dvc.md5"], specs, store)
            kept.commits.update([tags["git.commit"], *(run.commit for run in runs)])
            kept.data.update(md5 for run in runs for md5 in (*run.deps.values(), *run.outs.values()))
    return kept


def is_known(repository: Path, commit: str) -> bool:
    with contextlib.suppress(UserError):
        return bool(commit_of(repository, commit))
    return False


def keep_on_branch(repository: Path, kept: Kept) -> None:
    """A branch of `.dvc` files, one an object, which `dvc gc --all-branches` reads as it reads any other; its commit
    has those of the runs as parents, so that git keeps them."""
    lines = []
    for md5 in sorted(kept.data):
        text = f"outs:\n- md5: {md5}\n  hash: md5\n  path: {md5}\n"
        blob = git(repository, "hash-object", "-w", "--stdin", text=text)
        lines.append(f"100644 blob {blob}\t{md5}.dvc\n")
    tree = git(repository, "mktree", text="".join(lines))
    parents = [word for commit in sorted(kept.commits) for word in ("-p", commit)]
    message = "What registered versions were made of"
    commit = git(repository, *identity(repository), "commit-tree", *parents, "-m", message, tree)
    git(repository, "update-ref", f"refs/heads/{KEPT}", commit)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.prune", description=__doc__.splitlines()[0])
    parser.add_argument("--keep-days", type=float, default=7, help="workspaces untouched for longer go")
    parser.add_argument("--keep-branches", type=int, default=50, help="of the run branches, the newest so many stay")
    parser.add_argument("--gc", action="store_true", help="then drop from DVC's cache what no branch and no tag needs")
    arguments = parser.parse_args(argv)
    if min(arguments.keep_days, arguments.keep_branches) < 0:
        parser.error("--keep-days and --keep-branches must be 0 or more")
    try:
        with mlflow_told():
            removed = prune(arguments.keep_days, arguments.keep_branches)
            for name in [*removed.workspaces, *removed.branches]:
                print(f"removed {name}")
            print(f"removed in all: {removed}")
            if arguments.gc:
                print(f"collected garbage; {collect_garbage(Path())} objects of registered versions stay")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
