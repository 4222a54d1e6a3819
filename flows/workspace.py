"""A place of its own for a run: the repository at one revision, in a folder where nobody else works.

    with open_workspace("0193f2a1", revision="main") as workspace, workspace.entered():
        ...
        workspace.record("nightly")

A git worktree under `.rlhf/workspaces` of the repository, or a clone where the repository is an address. All of them
share DVC's cache, so that what one run made another finds; each has its own branch, `runs/ID`, and the repository's own
branches, index and files are left as they are.
"""

from __future__ import annotations

import configparser
import contextlib
import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError
from ruamel.yaml import YAML

from tasks.datasets import flat
from tasks.labels.label_file import locked
from tasks.labels.queue import LABELS
from tasks.stage import CHECKPOINTS, UserError
from tasks.tracking import JOURNALS, masked

WORKSPACES = Path(".rlhf/workspaces")
BRANCHES = "runs/"
INCOMING = ("data/raw", "data/labels")  # what people and other systems bring
ALL = "all"  # the lock of whoever must have no workspace begin
START = Path(".rlhf/start")  # in a workspace that is ready: the commit that it was made from
# what a run changes and git keeps: DVC ignores the large outs by .gitignore files of its own
RECORDED = ("dvc.lock", "params.yaml", "data")


@dataclass(frozen=True)
class Workspace:
    """One run's copy of the repository."""

    id: str
    path: Path
    repository: str  # a folder, or an address

    @property
    def branch(self) -> str:
        return BRANCHES + self.id

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The current folder, and where MLflow's record goes when nothing else is said, for as long as it lasts."""
        store = f"sqlite:///{home_of(self.repository) / 'mlflow.db'}"
        before = os.environ.get("MLFLOW_TRACKING_URI")
        os.environ["MLFLOW_TRACKING_URI"] = before or store
        try:
            with contextlib.chdir(self.path):
                yield
        finally:
            if before is None:
                del os.environ["MLFLOW_TRACKING_URI"]

    def set_params(self, values: Mapping[str, Any]) -> None:
        """Change params.yaml, {"ppo.kl_coef": 0.05}, and put it on the branch, so that every run says what it ran."""
        change_params(self.path / "params.yaml", values)
        if values:
            self.commit("Parameters: " + ", ".join(f"{key}={value}" for key, value in values.items()))

    def update_imports(self) -> None:
        """Bring what `dvc import` and `dvc import-url` brought in up to its source, and say so on the branch."""
        if files := imports(self.path, "HEAD"):
            done = _run(["dvc", "update", "--quiet", *files], self.path)
            if done.returncode:
                raise UserError(masked(f"`dvc update {' '.join(files)}` failed: {done.stderr.strip()[-2000:]}"))
            self.commit("Imports brought up to date")

    def take_labels(self) -> int:
        """Judgments that people have made at home since: whole lines that the files here lack, put on the branch in
        their order. Returns how many. UserError where one is damaged: on the branch it would be mended by nobody."""
        self.fetch_within(["data/labels"])
        taken = 0
        for file, row_type in LABELS.values():
            theirs, ours = home_of(self.repository) / file, self.path / file
            known = set(whole_lines(ours))
            if new := [line for line in whole_lines(theirs) if line not in known]:
                for line in new:
                    try:
                        row_type.model_validate_json(line)
                    except ValidationError as error:
                        raise UserError(
                            f"{theirs} has a damaged line: {error.errors()[0]['msg']}. Mend or remove it; it begins "
                            f"with {line[:60].decode(errors='replace')!r}."
                        ) from None
                ours.parent.mkdir(parents=True, exist_ok=True)
                with locked(ours) as end:
                    end.writelines(line + b"\n" for line in new)
                if ours.with_name(f"{ours.name}.dvc").exists():
                    done = _run(["dvc", "add", "--quiet", str(file)], self.path)
                    if done.returncode:
                        raise UserError(masked(f"`dvc add {file}` failed: {done.stderr.strip()[-2000:]}"))
                taken += len(new)
        if taken:
            self.commit(f"Labels: {taken} judgments")
        return taken

    def fetch_within(self, deps: Iterable[str]) -> None:
        """What DVC keeps of the folders among these; what cannot be had is left to whoever needs it."""
        if absent := absent_within(self.path, deps):
            _run(["dvc", "pull", "--quiet", *absent], self.path)

    def commit(self, message: str) -> str:
        """What changed goes to the workspace's branch; returns the commit."""
        present = [name for name in RECORDED if (self.path / name).exists()]
        git(self.path, "add", "--", *present)
        if git(self.path, "diff", "--cached", "--name-only"):
            git(self.path, *identity(self.path), "commit", "--quiet", "--no-verify", "-m", message)
        return git(self.path, "rev-parse", "HEAD")

    def changed(self, path: Path) -> bool:
        """Whether what is committed there is other than at the start."""
        start = (self.path / START).read_text(encoding="utf-8")
        return bool(git(self.path, "diff", "--name-only", start, "HEAD", "--", str(path)))

    def advance(self, branch: str) -> None:
        """Go on from another run's branch, which began where this one stands."""
        if is_address(self.repository):
            git(self.path, "fetch", "--quiet", "origin", branch)
            branch = "FETCH_HEAD"
        git(self.path, "merge", "--quiet", "--ff-only", branch)

    def push(self) -> list[str]:
        """Outs and run cache to the DVC remote; returns what found no place to go."""
        missing = []
        if remote_of(self.path):
            for more in ([], ["--run-cache"]):
                done = _run(["dvc", "push", *more], self.path)  # --quiet would hide why it fails
                if done.returncode:
                    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.startswith("ERROR")]
                    told = "\n".join(lines[:5]) or done.stderr.strip()[-2000:]
                    raise UserError(masked(f"`dvc push` failed: {told}"))
        else:
            missing.append("there is no DVC remote (core.remote): outs stay in the cache of this machine")
        return missing

    def publish(self) -> None:
        """A clone's branch goes to where it was cloned from; a worktree's is in the repository already."""
        if is_address(self.repository):
            git(self.path, "push", "--quiet", "--force", "origin", self.branch)

    def remove(self) -> None:
        """Its branch and what it put into DVC's cache stay; so does what MLflow has not got yet."""
        home = home_of(self.repository)
        for journal in (self.path / JOURNALS).glob("*"):
            target = home / JOURNALS / journal.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(journal, target)
        shutil.rmtree(self.path)
        if not is_address(self.repository):
            git(Path(self.repository), "worktree", "prune")


def whole_lines(file: Path) -> list[bytes]:
    """Without a last one that has no end: a page may be about to write it. None where there is no file."""
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def change_params(file: Path, values: Mapping[str, Any]) -> None:
    """Set dotted keys of a YAML file, which keeps its comments. UserError for a key that it does not have."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)  # as the file is written by hand: what did not change stays as it is
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    params = yaml.load(file)
    for key, value in values.items():
        *sections, last = key.split(".")
        section = params
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            near = difflib.get_close_matches(key, flat(params), n=1)
            raise UserError(f"params.yaml has no key `{key}`" + (f"; did you mean `{near[0]}`?" if near else "."))
        section[last] = value
    if values:
        yaml.dump(params, file)


@contextmanager
def open_workspace(id: str, revision: str = "HEAD", repository: str = ".", adopt: bool = True) -> Iterator[Workspace]:
    """The workspace of this id, made where it is missing. It stays when the context ends: the caller removes it.

    A run that is tried again finds its workspace as it left it, with its checkpoints; with `adopt`, a new one also has
    those of workspaces whose run is dead. UserError where another process has it, or the revision is unknown.
    """
    if not re.fullmatch(r"[\w.-]+", id):
        raise UserError(f"`{id}` cannot name a workspace: letters, digits, dots and dashes alone.")
    if not is_address(repository):
        repository = git(Path(repository), "rev-parse", "--show-toplevel")
    elif masked(repository) != repository:
        raise UserError("the repository's address has a password in it; give it to git by a credential helper.")
    root = home_of(repository) / WORKSPACES
    root.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(id, root / id, repository)
    with contextlib.ExitStack() as mine:
        with held(root, ALL, patience=600):  # nothing begins while garbage is collected
            mine.enter_context(held(root, id))
        if not (workspace.path / START).exists():
            shutil.rmtree(workspace.path, ignore_errors=True)  # one that broke off while it was made
            commit = _check_out(workspace, revision)
            share_dvc_store(workspace)
            if adopt:
                _adopt_checkpoints(workspace)
            (workspace.path / START).parent.mkdir(exist_ok=True)
            (workspace.path / START).write_text(commit, encoding="utf-8")
        yield workspace


@contextmanager
def held(root: Path, id: str, patience: float = 0) -> Iterator[None]:
    """No other process has it meanwhile. patience: seconds to wait for it before the UserError."""
    lock = FileLock(root / f"{id}.lock")
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(f"the workspace {id} is in use by another process.") from None
    try:
        yield
    finally:
        lock.release()


def _check_out(workspace: Workspace, revision: str) -> str:
    """Returns the commit."""
    if is_address(workspace.repository):
        git(Path(), "clone", "--quiet", workspace.repository, str(workspace.path))
        commit = commit_of(workspace.path, revision if revision == "HEAD" else f"origin/{revision}", revision)
        git(workspace.path, "switch", "--quiet", "-C", workspace.branch, commit)
    else:
        repository = Path(workspace.repository)
        git(repository, "worktree", "prune")
        commit = commit_of(repository, revision)
        git(repository, "worktree", "add", "--quiet", "--force", "-B", workspace.branch, str(workspace.path), commit)
    return commit


def commit_of(repository: Path, *names: str) -> str:
    """The commit that the first known one of the names means."""
    for name in names:
        with contextlib.suppress(UserError):
            return git(repository, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    raise UserError(f"{repository} has no commit `{names[-1]}`.")


def share_dvc_store(workspace: Workspace, *, git: bool = True) -> None:
    """The workspace's `.dvc/config.local`: the repository's own, with its cache and with whole paths to its remotes.

    What comes from a remote is held against its hash: DVC by itself trusts all remotes but folders.
    git: whether the workspace is git's; DVC refuses a folder that git ignores.
    """
    if is_address(workspace.repository):
        home = home_of(workspace.repository)
        cache, remotes = home / ".dvc/cache", _remotes_of(workspace.path)
        for name, url in remotes.items():
            if Path(url).is_relative_to(workspace.path):
                raise UserError(
                    f"the DVC remote `{name}` of {workspace.repository} is a folder within the clone, and would go "
                    "with it. Commit one that others can reach: dvc remote add --default store s3://BUCKET/PATH"
                )
    else:
        from dvc.repo import Repo

        with Repo(workspace.repository) as repo:
            cache = Path(repo.cache.local.path).parents[1]  # without files/md5
        remotes = _remotes_of(Path(workspace.repository))
    config = configparser.ConfigParser(interpolation=None)
    config.read(Path(workspace.repository) / ".dvc/config.local")
    for section, key, value in (
        ("cache", "dir", str(cache)),
        ("core", "no_scm", str(not git).lower()),
        *((f"'remote \"{name}\"'", "url", url) for name, url in remotes.items()),
        *((f"'remote \"{name}\"'", "verify", "true") for name in remotes),
    ):
        if not config.has_section(section):
            config.add_section(section)
        config.set(section, key, value)
    local = workspace.path / ".dvc/config.local"
    local.touch(mode=0o600)  # it may hold what the repository's own holds: credentials
    with local.open("w", encoding="utf-8") as file:
        config.write(file)


def _remotes_of(repository: Path) -> dict[str, str]:
    from dvc.repo import Repo

    with Repo(str(repository)) as repo:
        return {name: remote["url"] for name, remote in repo.config["remote"].items()}


def _adopt_checkpoints(workspace: Workspace) -> None:
    """Have here, too, what killed runs left. Checkpoints are keyed by all that they depend on: none is resumed by
    mistake. They are links and stay where they are, for the run that may yet be tried again."""
    for other in workspace.path.parent.iterdir():
        if not other.is_dir() or other == workspace.path:
            continue
        with contextlib.suppress(UserError), held(other.parent, other.name):
            for step in (other / CHECKPOINTS).glob("*/*/step-*"):
                target = workspace.path / step.relative_to(other)
                if not target.exists():
                    shutil.copytree(step, target, copy_function=os.link)


def imports(repository: Path, revision: str) -> list[str]:
    """The `.dvc` files of raw data and labels that came from elsewhere, by `dvc import` or `dvc import-url`."""
    files = git(repository, "ls-tree", "-r", "--name-only", revision, "--", *INCOMING).splitlines()
    return [
        file
        for file in files
        if file.endswith(".dvc") and "\ndeps:" in "\n" + git(repository, "show", f"{revision}:{file}")
    ]


def absent_within(folder: Path, deps: Iterable[str]) -> list[str]:
    """What people track with DVC in a folder that a stage reads, and is not there: the .dvc files. `dvc repro --pull`
    fetches a dep that is missing as a whole, and takes a folder that lacks files for one that has changed."""
    tracked = (file for dep in deps if (folder / dep).is_dir() for file in (folder / dep).rglob("*.dvc"))
    return sorted(str(file.relative_to(folder)) for file in tracked if not file.with_suffix("").exists())


def is_address(repository: str) -> bool:
    return "://" in repository or bool(re.match(r"[\w.-]+@[\w.-]+:", repository))


def name_of(repository: str) -> str:
    """Short, and the same in every process: what Prefect's variables of this repository end in."""
    return hashlib.sha256(repository.encode()).hexdigest()[:8]


def home_of(repository: str) -> Path:
    """The folder that outlives workspaces: the repository; for an address, the current folder when first asked."""
    return _HOME if is_address(repository) else Path(repository).resolve()


_HOME = Path.cwd()


def remote_of(folder: Path) -> str:
    """The name of DVC's default remote, or ""."""
    return _run(["dvc", "config", "core.remote"], folder).stdout.strip()


def git(folder: Path, *args: str, text: str | None = None) -> str:
    """What git says. text: what it reads."""
    done = _run(["git", *args], folder, text)
    if done.returncode:
        raise UserError(masked(f"`git {' '.join(args)}` in {folder.resolve()}: {done.stderr.strip()}"))
    return done.stdout.strip()


def _run(command: list[str], folder: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path, "GIT_TERMINAL_PROMPT": "0"},  # nobody is there to type a password
        capture_output=True,
        encoding="utf-8",
        input=text,
        check=False,
    )


def identity(folder: Path) -> list[str]:
    """For `git commit` on machines where nobody has introduced themselves."""
    known = _run(["git", "config", "user.email"], folder).stdout.strip()
    return [] if known else ["-c", "user.name=rlhf", "-c", "user.email=rlhf@localhost"]
