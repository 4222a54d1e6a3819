"""What depends on what, and what made it: dvc.yaml, dvc.lock and git, read and never written.

dvc.yaml is the only list of the stages. Everything that needs to know a stage's name, its inputs, its outputs or its
place in the graph asks here.

    python -m tasks.lineage models:/policy@candidate

says which labels made a registered model (tasks/labels/provenance.py).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks.datasets import flat
from tasks.stage import MergeConflictError, UserError, read_yaml

NAMED = 2  # changed parameters in the name of a run; the rest are counted
LONGEST_VALUE = 24  # characters


@dataclass(frozen=True)
class StageSpec:
    """One stage as dvc.yaml declares it. Paths are relative to the repository's root, as written there."""

    name: str
    cmd: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]  # outs, metrics and plots alike
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def data_deps(self) -> tuple[str, ...]:
        """The inputs that are data, without the code files and folders."""
        return tuple(dep for dep in self.deps if not dep.endswith(".py") and not dep.startswith("tasks/"))


def _paths(entries: list[Any]) -> tuple[str, ...]:
    """DVC writes an entry as a path or as {path: options}."""
    return tuple(entry if isinstance(entry, str) else next(iter(entry)) for entry in entries)


def load_stages(root: Path = Path()) -> dict[str, StageSpec]:
    """The stages of dvc.yaml in an order in which they can run."""
    declared = read_yaml(root / "dvc.yaml")["stages"]
    specs = {
        name: StageSpec(
            name=name,
            cmd=stage["cmd"],
            deps=_paths(stage.get("deps", [])),
            params=_paths(stage.get("params", [])),
            outs=_paths([*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]),
            meta=stage.get("meta", {}),
        )
        for name, stage in declared.items()
    }
    order = TopologicalSorter(upstream(specs)).static_order()
    return {name: specs[name] for name in order}


def upstream(specs: dict[str, StageSpec]) -> dict[str, set[str]]:
    """For each stage the stages that write something it reads."""

    def overlaps(dep: str, out: str) -> bool:
        return dep == out or dep.startswith(out + "/") or out.startswith(dep + "/")

    return {
        name: {
            other.name
            for other in specs.values()
            if other.name != name and any(overlaps(dep, out) for dep in spec.deps for out in other.outs)
        }
        for name, spec in specs.items()
    }


def locked_outs(stage: str, root: Path = Path()) -> dict[str, str]:
    """{path: DVC hash} of what the stage last wrote, from dvc.lock; empty when it never ran to its end."""
    return {out["path"]: out["md5"] for out in read_lock(root).get(stage, {}).get("outs", [])}


def read_lock(root: Path = Path()) -> dict[str, Any]:
    """dvc.lock's stages. UserError where the file cannot be used."""
    lock = root / "dvc.lock"
    for attempt in range(10):  # DVC writes the file in place: a reader beside it may find it empty or cut off
        if not lock.exists():
            return {}
        try:
            return dict(read_yaml(lock)["stages"])
        except MergeConflictError:
            raise
        except (UserError, FileNotFoundError, TypeError, KeyError):
            time.sleep(0.05 * (attempt + 1))
    raise UserError(f"{lock} is damaged. Restore it with `git checkout {lock}`, or remove it and run again.")


def run_name(root: Path = Path()) -> str:
    """What a person knows a run by: the parameters that are not as in the last run, `kl_coef 0.02 → 0.1`; where all
    are, the subject of the commit, and the files that are not as in it."""
    named = describe_changes(changed_params(root), NAMED)
    return named or ", ".join(_commit_subject(root)) or f"run of {datetime.now():%Y-%m-%d %H:%M}"


def changed_params(root: Path = Path()) -> dict[str, tuple[Any, Any]]:
    """What stands otherwise in params.yaml than a stage of dvc.lock had it. Of params.yaml and dvc.lock that cannot be
    read, other code tells."""
    try:
        now = flat(read_yaml(root / "params.yaml") or {})
        stages = read_lock(root).values()
    except (UserError, OSError):
        return {}
    before: dict[str, Any] = {}
    for stage in stages:
        locked = flat(stage.get("params", {}).get("params.yaml", {}))
        before = locked | {key: value for key, value in before.items() if value != now.get(key)}
    return differing(before, now)


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{"kl_coef": (before, now)} of the parameters that both have with another value, in the order of `now`.

    A name that several sections have is given in full: `sft.learning_rate`.
    """
    last = Counter(key.rpartition(".")[2] for key in now)
    return {
        name if last[name := key.rpartition(".")[2]] == 1 else key: (before[key], value)
        for key, value in now.items()
        if key in before and before[key] != value
    }


def describe_changes(changed: Mapping[str, tuple[Any, Any]], most: int | None = None) -> str:
    """`kl_coef 0.02 → 0.1, updates 8 → 12, +3`. most: how many are named."""
    told = [f"{name} {_short(before)} → {_short(now)}" for name, (before, now) in changed.items()]
    rest = len(told) - (most or len(told))
    return ", ".join([*told[:most], *([f"+{rest}"] if rest > 0 else [])])


def _short(value: Any) -> str:
    """A list, say, is too long to be read in a name."""
    text = "null" if value is None else str(value)
    return text if len(text) <= LONGEST_VALUE else "…"


def hash_path(path: Path) -> str:
    """DVC's own hash of a file or a folder (md5; a folder's ends in `.dir`), as it will stand in dvc.lock."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import LocalFileSystem
    from dvc_objects.fs.memory import MemoryFileSystem

    staging = HashFileDB(MemoryFileSystem(global_store=False), "/")
    _, _, obj = build(staging, str(path.resolve()), LocalFileSystem(), "md5", dry_run=True)
    assert obj.hash_info.value
    return str(obj.hash_info.value)


def environment() -> dict[str, str]:
    """What the bits of a result may depend on beside code, data and parameters."""
    packages = {name: _version(name) for name in ("torch", "transformers", "trl", "accelerate", "tokenizers", "numpy")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "python": platform.python_version(),
        **packages,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "threads": os.environ.get("OMP_NUM_THREADS", str(cores)),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _cpu() -> str:
    """The model, with the widest vector instructions: they decide which of MKL's kernels runs."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    widest = next((flag for flag in ("amx_tile", "avx512f", "avx2", "avx") if flag in flags), "")
    return f"{facts.get('model name', 'unknown')} {widest}".strip()


def git_state(root: Path = Path()) -> tuple[str, bool]:
    """(commit, whether tracked files differ from it); ("none", True) where there is no repository or no commit yet."""
    try:
        return _git(root, "rev-parse", "HEAD"), bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "none", True


def _commit_subject(root: Path = Path()) -> list[str]:
    """The first line of the commit's message, and `uncommitted: tasks/sft.py, +2` of what a run does not write; empty
    where there is no commit yet."""
    written = ("params.yaml", "dvc.lock", "data/reports")  # params.yaml: what is run with another value is named by it
    try:
        subject = _git(root, "log", "-1", "--format=%s")
        files = _git(root, "diff", "--name-only", "--relative", "HEAD", "--", ".", *(f":!{path}" for path in written))
    except (subprocess.CalledProcessError, FileNotFoundError):
        return []
    first, *more = files.splitlines() or [""]
    return [subject, *([f"uncommitted: {first}"] if first else []), *([f"+{len(more)}"] if more else [])]


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=root, capture_output=True, encoding="utf-8", check=True).stdout.strip()


if __name__ == "__main__":
    from tasks.labels.provenance import main  # not above: every stage imports this module

    sys.exit(main())
