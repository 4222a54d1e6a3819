"""Tell Prefect when labels or raw data are new: the event `rlhf.new-labels` starts the deployment `on-new-labels`.

New is what the repository's current commit, or its upstream's after a fetch, says of `data/raw` and `data/labels`:
files that git keeps, and the hashes in the `.dvc` files of what DVC keeps. Data that `dvc import` or `dvc import-url`
brought in count as new as soon as their source has changed.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from prefect.events import emit_event
from prefect.variables import Variable

from flows.workspace import INCOMING, git, imports
from tasks.stage import UserError

EVENT = "rlhf.new-labels"


class Watcher:
    """Looks at one repository. What it saw last is a Prefect variable, so a restart tells nothing twice."""

    def __init__(self, repository: Path) -> None:
        self.repository = Path(git(repository, "rev-parse", "--show-toplevel"))
        name = hashlib.sha256(str(self.repository).encode()).hexdigest()[:8]
        self.variable = f"rlhf_labels_{name}"

    def look(self) -> bool:
        """Whether there is something new; then the event is out. The first look only takes note."""
        try:
            revision = self.revision()
            state = self.state(revision)
        except UserError as error:
            print(f"warning: cannot look for new labels: {error}", file=sys.stderr)
            return False
        before = Variable.get(self.variable, default=None)
        if state == before:
            return False
        Variable.set(self.variable, state, overwrite=True)
        if before is None:
            return False
        emit_event(
            EVENT, resource={"prefect.resource.id": f"rlhf.repository.{self.variable}"}, payload={"revision": revision}
        )
        return True

    def revision(self) -> str:
        """The commit to look at: the upstream's newest where there is one."""
        try:
            upstream = git(self.repository, "rev-parse", "--abbrev-ref", "@{upstream}")
        except UserError:
            return git(self.repository, "rev-parse", "HEAD")
        git(self.repository, "fetch", "--quiet")
        return git(self.repository, "rev-parse", upstream)

    def state(self, revision: str) -> str:
        """A hash of all that is watched."""
        tree = git(self.repository, "ls-tree", "-r", revision, "--", *INCOMING)
        return hashlib.sha256("\n".join([tree, *self.sources(revision)]).encode()).hexdigest()

    def sources(self, revision: str) -> list[str]:
        """What each import's source is now, beside what was imported of it. (`dvc status` skips frozen stages.)"""
        from dvc.dependency.repo import RepoDependency
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        found = []
        for file in imports(self.repository, revision):
            try:
                with Repo(str(self.repository), rev=revision) as repo:
                    for stage in repo.stage.load_file(file):
                        for dep in stage.deps:
                            known = isinstance(dep, RepoDependency) or not dep.exists
                            found.append(f"{dep} {dep.status()} {'' if known else dep.get_hash().value}")
            except (DvcException, OSError) as error:
                raise UserError(f"{file}: {error}") from None
        return found
