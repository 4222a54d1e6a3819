"""Tell Prefect when labels or raw data are new: the event `rlhf.new-labels` starts the deployment `on-new-labels`.
Runs that wait for people's labels are resumed when these are there (flows/waiting.py).

    python -m flows.watch       looks every minute, until Ctrl-C; `make serve` does the same

New is what the repository's current commit, or its upstream's after a fetch, says of `data/raw` and `data/labels`:
files that git keeps, and the hashes in the `.dvc` files of what DVC keeps. Data that `dvc import` or `dvc import-url`
brought in count as new as soon as their source has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

from prefect.events import emit_event
from prefect.variables import Variable

from flows.waiting import resume_those_with_labels
from flows.workspace import INCOMING, git, imports, name_of
from tasks.stage import UserError
from tasks.tracking import masked

EVENT = "rlhf.new-labels"


class Watcher:
    """Looks at one repository. What it saw last is a Prefect variable, so a restart tells nothing twice."""

    def __init__(self, repository: Path) -> None:
        self.repository = Path(git(repository, "rev-parse", "--show-toplevel"))
        self.variable = f"rlhf_labels_{name_of(str(self.repository))}"

    def look(self) -> bool:
        """Whether there is something new; then the event is out. The first look only takes note."""
        self.look_at_waiting()
        try:
            revision = self.revision()
            state = self.state(revision)
            before = Variable.get(self.variable, default=None)
            is_new = before is not None and state != before
            if is_new:  # told before it is noted: a break between the two tells it twice, and loses nothing
                resource = {"prefect.resource.id": f"rlhf.repository.{self.variable}"}
                emit_event(EVENT, resource=resource, payload={"revision": revision})
            if state != before:
                Variable.set(self.variable, state, overwrite=True)
        except Exception as error:  # git's, DVC's or Prefect's servers may be away for a while: the next look will see
            print(f"warning: cannot look for new labels: {masked(str(error))}", file=sys.stderr)
            return False
        return is_new

    def look_at_waiting(self) -> None:
        try:
            for run in resume_those_with_labels(self.repository):
                print(f"the run {run} has its labels and goes on", flush=True)
        except Exception as error:
            print(f"warning: cannot look at the runs that wait: {masked(str(error))}", file=sys.stderr)

    def revision(self) -> str:
        """The commit to look at: the upstream's newest where there is one."""
        try:
            upstream = git(self.repository, "rev-parse", "--abbrev-ref", "@{upstream}")
        except UserError:
            return git(self.repository, "rev-parse", "HEAD")
        git(self.repository, "-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=30", "fetch", "--quiet")
        return git(self.repository, "rev-parse", upstream)

    def state(self, revision: str) -> str:
        """A hash of all that is watched."""
        tree = git(self.repository, "ls-tree", "-r", revision, "--", *INCOMING)
        return hashlib.sha256("\n".join([tree, *self.sources(revision)]).encode()).hexdigest()

    def sources(self, revision: str) -> list[str]:
        """The hash of each import's source as it is now. (`dvc status` skips frozen stages.)"""
        from dvc.dependency.repo import RepoDependency
        from dvc.exceptions import DvcException
        from dvc.fs import LocalFileSystem
        from dvc.repo import Repo

        found = []
        for file in imports(self.repository, revision):
            try:
                with Repo(str(self.repository), rev=revision) as repo:
                    for stage in repo.stage.load_file(file):
                        for dep in stage.deps:
                            if isinstance(dep, RepoDependency):
                                dep.update()  # in memory: from the commit that was imported to the newest
                            elif dep.protocol == "local":
                                dep.fs = LocalFileSystem()  # of a remote that is a folder DVC asks git, at a revision
                            found.append(f"{dep} {dep.get_hash().value if dep.exists else ''}")
            except (DvcException, OSError) as error:
                raise UserError(f"{file}: {error}") from None
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.watch", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="between two looks")
    arguments = parser.parse_args(argv)
    try:
        watcher = Watcher(Path())
        while True:
            if watcher.look():
                print("new labels or raw data: told Prefect", flush=True)
            time.sleep(arguments.seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
