"""What a stage is handed: its typed parameters, the inputs it declared, a place for its outputs, a tracker."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.checkpoints import Checkpoints
    from tasks.lineage import StageSpec
    from tasks.params import Params
    from tasks.tracking import Tracker


CHECKPOINTS = Path(".rlhf/checkpoints")  # git-ignored, outside every out: DVC removes those before a stage runs
LABELS = "data/labels/"  # people add to these files at any time


class UserError(Exception):
    """Something that the user can mend. The message says what was wrong, where and what to do; no traceback follows."""


class MergeConflictError(UserError):
    """git could not merge a file and has left both sides in it."""


class WaitsForPeopleError(UserError):
    """A stage cannot go on before people have labelled more; the queue is open to them (tasks/labels/queue.py)."""

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing  # judgments


class Stage:
    """One run of one stage. A stage module has `run(stage: Stage) -> None` and touches the disk through this alone.

    Outputs are written to a temporary path beside their final one and renamed by `commit`, so that a stage that fails
    or is killed leaves nothing half-written.
    """

    def __init__(self, spec: StageSpec, params: Params, tracker: Tracker, root: Path = Path()) -> None:
        self.spec = spec
        self.params = params
        self.tracker = tracker
        self.root = root
        self._pending: dict[Path, Path] = {}  # temporary path -> final path
        self._growing: dict[str, str] = {}  # files of labels that were read -> SHA-256 before

    def dep(self, path: str) -> Path:
        """An input. It must be declared in dvc.yaml, or lie within something declared, and exist."""
        if not any(path == dep or path.startswith(dep + "/") for dep in self.spec.deps):
            raise AssertionError(f"stage {self.spec.name} reads {path}, which dvc.yaml does not declare as its dep")
        full = self.root / path
        if not full.exists():
            if path.startswith("data/labels/"):  # people's, which git keeps and nothing makes anew
                raise UserError(missing_labels(path, self.spec.name))
            raise UserError(
                f"{path} is missing: the stage `{self.spec.name}` reads it.\n"
                f"Run `dvc repro {self.spec.name}` to make everything that it needs, or `dvc pull {path}` to fetch it."
            )
        if path.startswith(LABELS) and full.is_file():
            self._growing.setdefault(path, _digest(full))
        return full

    def out(self, path: str) -> Path:
        """The temporary path to write the declared output `path` to. Its parent exists; it itself does not."""
        if path not in self.spec.outs:
            raise AssertionError(f"stage {self.spec.name} writes {path}, which dvc.yaml does not declare as its out")
        final = self.root / path
        temporary = final.parent / f".tmp-{final.name}"
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        self._pending[temporary] = final
        return temporary

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Where a training stage keeps what it resumes from: `.rlhf/checkpoints/STAGE/FINGERPRINT/step-000024/`.

        They outlive a stage that fails or is killed, and are removed by `commit`. On disk are at most, of a stage, the
        two newest, one more while it is written, and one of the last run with other code, data or parameters.
        """
        from tasks.checkpoints import Checkpoints, remove_other_runs  # they import torch, which other stages need not

        fingerprint = self.fingerprint()
        folder = self.root / CHECKPOINTS / self.spec.name / fingerprint[:16]
        remove_other_runs(folder)
        return Checkpoints(folder, fingerprint=fingerprint)

    def fingerprint(self) -> str:
        """A hash of all that the result depends on: the command, the content of the inputs and the code, parameters."""
        parts = {
            "cmd": self.spec.cmd,
            "deps": {dep: dict(_content(self.root / dep)) for dep in self.spec.deps},
            "params": self.params.declared(self.spec.params),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def commit(self) -> None:
        """Put every output in its place. What the stage could have resumed from is not needed any more.

        UserError where people labelled meanwhile: DVC hashes what was read when the stage has ended, and would take
        labels that came too late for labels that were used.
        """
        for path, before in self._growing.items():
            if _digest(self.root / path) != before:
                raise UserError(f"{path} changed while the stage read it: people are labelling. Run it again.")
        for temporary, final in self._pending.items():
            _remove(final)
            temporary.replace(final)
        self._pending.clear()
        if "checkpoints" in vars(self):
            self.checkpoints.clear()

    def discard(self) -> None:
        """Remove what was written so far."""
        for temporary in self._pending:
            _remove(temporary)
        self._pending.clear()


def missing_labels(path: str, stage: str) -> str:
    return (
        f"{path} is missing: the stage `{stage}` reads it.\n"
        f"`git checkout {path}` brings it back as it was committed; `touch {path}` begins with no labels."
    )


def _content(path: Path) -> Iterator[tuple[str, str]]:
    """(path within, SHA-256) of a file, or of each file in a folder but what Python writes beside the code."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            yield file.relative_to(path).as_posix(), _digest(file)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_yaml(path: Path) -> Any:
    return parse_yaml(path.read_text(encoding="utf-8"), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """What a YAML file called `name` holds; UserError says in which line it holds something else."""
    from ruamel.yaml import YAML  # the trainer alone needs none of it
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith(("<<<<<<< ", ">>>>>>> ")):
            raise MergeConflictError(
                f"{name}, line {number}: git could not merge this file and left both sides in it. Keep one of them: "
                f"edit it, or `git checkout --ours {name}` (or --theirs), then `git add {name}`, and run again."
            )
    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{name}{where}: not valid YAML ({problem}).") from None
