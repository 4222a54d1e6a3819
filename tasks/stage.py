"""What a stage is handed: its typed parameters, the inputs it declared, a place for its outputs, a tracker."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.lineage import StageSpec
    from tasks.params import Params
    from tasks.tracking import Tracker


class UserError(Exception):
    """Something that the user can mend. The message says what was wrong, where and what to do; no traceback follows."""


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

    def dep(self, path: str) -> Path:
        """An input. It must be declared in dvc.yaml, or lie within something declared, and exist."""
        if not any(path == dep or path.startswith(dep + "/") for dep in self.spec.deps):
            raise AssertionError(f"stage {self.spec.name} reads {path}, which dvc.yaml does not declare as its dep")
        full = self.root / path
        if not full.exists():
            raise UserError(
                f"{path} is missing: the stage `{self.spec.name}` reads it.\n"
                f"Run `dvc repro {self.spec.name}` to make everything that it needs, or `dvc pull {path}` to fetch it."
            )
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

    def commit(self) -> None:
        """Put every output in its place."""
        for temporary, final in self._pending.items():
            _remove(final)
            temporary.replace(final)
        self._pending.clear()

    def discard(self) -> None:
        """Remove what was written so far."""
        for temporary in self._pending:
            _remove(temporary)
        self._pending.clear()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
