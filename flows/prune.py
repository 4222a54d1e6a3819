"""Remove what scheduled runs leave behind: `python -m flows.prune`.

Workspaces go when nobody works in them and they are old; branches `runs/ID` go when there are more than asked for.
A branch whose commit a registered version was made from stays: with it `dvc gc --all-branches` keeps what the version
needs. This is the only place that calls `dvc gc`.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from flows.workspace import BRANCHES, WORKSPACES, Workspace, git, held
from tasks.stage import UserError
from tasks.tracking import connect, masked, tracking_uri


class Removed(NamedTuple):
    workspaces: list[str]
    branches: list[str]

    def __str__(self) -> str:
        return f"{len(self.workspaces)} workspaces, {len(self.branches)} branches"


def prune(keep_days: float, keep_branches: int, repository: Path = Path()) -> Removed:
    """Workspaces untouched for so many days; run branches but the newest so many and those of registered versions."""
    return Removed(prune_workspaces(repository, keep_days), prune_branches(repository, keep_branches))


def prune_workspaces(repository: Path, keep_days: float) -> list[str]:
    repository = Path(git(repository, "rev-parse", "--show-toplevel"))
    removed = []
    root = repository / WORKSPACES
    for folder in sorted(root.glob("*/")):
        if time.time() - folder.stat().st_mtime < keep_days * 86400:
            continue
        with contextlib.suppress(UserError), held(root, folder.name):
            Workspace(folder.name, folder, str(repository)).remove()
            removed.append(folder.name)
    return removed


def prune_branches(repository: Path, keep: int) -> list[str]:
    """Needs MLflow's word on what is registered: where it cannot be asked, nothing is removed."""
    listed = git(
        repository, "for-each-ref", "--sort=-committerdate", "--format=%(refname:short)", f"refs/heads/{BRANCHES}"
    )
    branches = listed.splitlines()
    worktrees = git(repository, "worktree", "list", "--porcelain")
    needed = registered_commits()
    removed = []
    for branch in branches[keep:]:
        if f"branch refs/heads/{branch}\n" in worktrees + "\n":
            continue
        commits = git(repository, "rev-list", branch).split()
        if needed & set(commits[:2]):  # the run's own commits: what it recorded, on top of its parameters
            continue
        git(repository, "branch", "--quiet", "-D", branch)
        removed.append(branch)
    return removed


def registered_commits() -> set[str]:
    """The commits that registered versions were made from, and those that recorded the runs."""
    client = connect()
    versions = client.search_model_versions()
    return {
        version.tags[key] for version in versions for key in ("git.commit", "git.run_commit") if version.tags.get(key)
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.prune", description=__doc__.splitlines()[0])
    parser.add_argument("--keep-days", type=float, default=7, help="workspaces untouched for longer go")
    parser.add_argument("--keep-branches", type=int, default=50, help="of the run branches, the newest so many stay")
    parser.add_argument("--gc", action="store_true", help="then drop from DVC's cache what no branch and no tag needs")
    arguments = parser.parse_args(argv)
    from mlflow.exceptions import MlflowException

    try:
        removed = prune(arguments.keep_days, arguments.keep_branches)
        for name in [*removed.workspaces, *removed.branches]:
            print(f"removed {name}")
        print(f"removed in all: {removed}")
        if arguments.gc:
            subprocess.run(
                [sys.executable, "-m", "dvc", "gc", "--force", "--workspace", "--all-branches", "--all-tags"],
                check=True,
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError:
        return 1
    except (MlflowException, OSError) as error:
        print(f"error: MLflow at {masked(tracking_uri())}: {masked(str(error)).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
