"""Checkpoints of a training run: what it takes to go on after a kill and end with the same bits.

    checkpoints = Checkpoints(folder, fingerprint=...)
    if checkpoint := checkpoints.latest():
        load_optimizer_state(optimizer, pick("optimizer", checkpoint.tensors), checkpoint.facts["optimizer"])
    ...
    tensors, facts = optimizer_state(optimizer)
    checkpoints.save(step, nest("optimizer", tensors), {"optimizer": facts})

A checkpoint is a folder `step-000024/` of `tensors.safetensors`, `facts.json` and `manifest.json`, which has the size
and the SHA-256 of the other two; nothing in it is pickled. It is written beside its place, flushed to the disk and
renamed: it is there as a whole or not at all. Python's library, torch and safetensors are all that is needed here.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
TENSORS, FACTS, MANIFEST = "tensors.safetensors", "facts.json", "manifest.json"


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]  # on the CPU
    facts: dict[str, Any]  # as JSON gives them back: tuples are lists, keys are texts
    written: float  # seconds since 1970

    def announce(self, stage: str, unit: str, total: int) -> None:
        """One line on stderr: `sft: resuming at step 24 of 44 (checkpoint written 3 min ago)`."""
        age = _readable(time.time() - self.written)
        print(f"{stage}: resuming at {unit} {self.step} of {total} (checkpoint written {age} ago)", file=sys.stderr)


class Checkpoints:
    """The checkpoints of one run, in a folder of their own: `keep` at most, and one more while it is written.

    `fingerprint` names what the run depends on; a checkpoint that bears another one is not used.
    """

    def __init__(self, folder: Path, *, fingerprint: str, keep: int = 2) -> None:
        self.folder, self.fingerprint, self.keep = folder, fingerprint, keep
        self._refused: set[Path] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove those that are too many. It moves no random generator.

        Tensors may lie on any device, share memory and be non-contiguous; facts are what JSON can hold. Where the disk
        is full, say, a warning tells so and training goes on: the checkpoints before are still there.
        """
        self._remove_half_written()
        target = self.folder / f"step-{step:06}"
        temporary = self.folder / f".tmp-{os.getpid()}-{target.name}"
        try:
            temporary.mkdir(parents=True)
            self._write(temporary, step, tensors, facts)
            if target.exists():  # it was refused, or the run began anew
                shutil.rmtree(target)
            temporary.rename(target)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            print(f"warning: the checkpoint {target} could not be written ({error}); going on.", file=sys.stderr)
        else:
            self._refused.discard(target)
            self._prune(step)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The newest that is whole and of this run. Each that is refused gets a line on stderr that says why."""
        for path in sorted(self._paths(), key=_step_of, reverse=True):
            try:
                return self._read(path)
            except _RefusedError as reason:
                self._refused.add(path)
                print(f"warning: the checkpoint {path} is not used: {reason}. Trying the one before.", file=sys.stderr)
        return None

    def clear(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        save_file(_separate(tensors), folder / TENSORS)
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        files = {
            path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in (folder / TENSORS, folder / FACTS)
        }
        manifest = {
            "format": FORMAT,
            "step": step,
            "fingerprint": self.fingerprint,
            "written": time.time(),
            "files": files,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            _flush(path)

    def _read(self, path: Path) -> Checkpoint:
        """_RefusedError says why it cannot be used."""
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise _RefusedError(f"its format is {manifest['format']}, and this code reads {FORMAT}")
            if manifest["fingerprint"] != self.fingerprint:
                raise _RefusedError("it is of another run: its fingerprint is another")
            if manifest["step"] != _step_of(path):
                raise _RefusedError(f"its manifest is of step {manifest['step']}")
            for file in (path / TENSORS, path / FACTS):
                told, size = manifest["files"][file.name], file.stat().st_size
                if size != told["size"]:
                    raise _RefusedError(f"{file.name} is torn, {size} of {told['size']} bytes")
                if _sha256(file) != told["sha256"]:
                    raise _RefusedError(f"{file.name} is damaged, its checksum is wrong")
            facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
            return Checkpoint(manifest["step"], load_file(path / TENSORS), facts, float(manifest["written"]))
        except FileNotFoundError as error:
            raise _RefusedError(f"{Path(error.filename).name} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _RefusedError(f"it cannot be read ({type(error).__name__}: {error})") from None

    def _paths(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]

    def _prune(self, step: int) -> None:
        """Keep the newest up to this step: one beyond it was refused, or is of a run that began anew."""
        usable = [path for path in self._paths() if path not in self._refused and _step_of(path) <= step]
        kept = sorted(usable, key=_step_of)[-self.keep :]
        for path in set(self._paths()) - set(kept):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_half_written(self) -> None:
        """What processes that are dead had begun."""
        for path in self.folder.glob(".tmp-*-step-*"):
            pid = int(path.name.split("-")[1])
            if pid == os.getpid() or not _is_alive(pid):
                shutil.rmtree(path, ignore_errors=True)


class _RefusedError(Exception):
    pass


def remove_other_runs(folder: Path) -> None:
    """Of the runs whose checkpoints lie beside this folder, keep the one used last, and of it the newest checkpoint."""
    others = [path for path in folder.parent.glob("*") if path.is_dir() and path != folder]
    others.sort(key=lambda path: path.stat().st_mtime)
    for other in others[:-1]:
        shutil.rmtree(other, ignore_errors=True)
    for other in others[-1:]:
        checkpoints = Checkpoints(other, fingerprint=other.name, keep=1)
        checkpoints._remove_half_written()
        checkpoints._prune(sys.maxsize)
    if folder.exists():
        now = time.time_ns()  # by default the file system's clock: it stands still for milliseconds
        os.utime(folder, ns=(now, now))


# ---- names ----


def nest(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{"a": t} -> {"prefix/a": t}"""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def pick(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `nest` put there: {"prefix/a": t, "other/b": u} -> {"a": t}"""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


# ---- states ----


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors such as "3/exp_avg", where 3 is the parameter's place; facts: the rest of its state_dict)"""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = defaultdict(dict)
    for place, state in whole["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{place}/{key}"] = value
            else:
                rest[str(place)][key] = value
    return tensors, {"state": rest, "param_groups": whole["param_groups"]}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Into an optimizer over the same parameters, which makes these tensors its own. ValueError where they differ."""
    state: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, tensor in tensors.items():
        place, key = name.split("/", 1)
        state[int(place)][key] = tensor
    for place, rest in facts["state"].items():
        state[int(place)].update(rest)
    groups = [
        {key: tuple(value) if isinstance(own.get(key), tuple) else value for key, value in group.items()}
        for own, group in zip(optimizer.param_groups, facts["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of the random generators that everybody shares: Python's, numpy's, torch's on CPU and CUDA."""
    version, internal, gauss = random.getstate()
    tensors = {"python": torch.tensor(internal), "torch": torch.get_rng_state()}
    facts: dict[str, Any] = {"python": {"version": version, "gauss": gauss}}
    if "numpy" in sys.modules:
        import numpy as np

        state: Any = np.random.get_state(legacy=False)
        tensors["numpy"] = torch.tensor(state["state"]["key"].tolist())
        facts["numpy"] = {**state, "state": state["state"]["pos"]}
    if torch.cuda.is_available():
        tensors |= {f"cuda/{device}": state for device, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, facts


def restore_rng(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Put the shared random generators where `rng_state` found them."""
    python = facts["python"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    torch.set_rng_state(tensors["torch"])
    if "numpy" in facts:
        import numpy as np

        key = np.array(tensors["numpy"].tolist(), dtype=np.uint32)
        np.random.set_state({**facts["numpy"], "state": {"key": key, "pos": facts["numpy"]["state"]}})
    for device in range(torch.cuda.device_count()):
        if f"cuda/{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda/{device}"], device)


# ---- helpers ----


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as safetensors wants them: on the CPU, contiguous, no two in the same memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """A file's content, or a folder's list of names, down to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _readable(seconds: float) -> str:
    units: Iterable[tuple[str, float]] = (("days", 86400), ("h", 3600), ("min", 60))
    name, size = next(((name, size) for name, size in units if seconds >= 2 * size), ("s", 1.0))
    return f"{max(0.0, seconds) / size:.0f} {name}"
