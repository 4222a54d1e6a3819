"""Run work in a process of its own and kill it with SIGKILL at a chosen moment.

A moment is a count of the calls that Python makes, of its own functions and of others', since the training asked for
its latest checkpoint: the same number is about the same place in every run, so a test that draws numbers from a seed
finds again what it found.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

import torch

from tasks.checkpoints import Checkpoints
from tasks.lineage import load_stages


class Ran(NamedTuple):
    killed: bool = False
    calls: int = 0  # all that were counted
    spans: Mapping[str, list[tuple[int, int]]] = MappingProxyType({})  # of each phase: the counts at start and end

    @property
    def saves(self) -> list[tuple[int, int]]:
        """The writes of checkpoints."""
        return self.spans[Checkpoints.save.__qualname__]


os.environ.setdefault("MKL_CBWR", "AUTO")  # as tasks/run.py sets it before torch is imported
# One server process imports what takes long, once; each run is a fork of it and starts in a moment
_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "trl.trainer.sft_trainer",
        "transformers.models.llama.modeling_llama",
        "peft",
        "pytest",
        "tasks.params",
        "mlflow.artifacts",
        "mlflow.store.tracking.sqlalchemy_store",
    ]
)


def run_apart(
    work: Callable[..., None],
    *arguments: Any,
    kill_at: int | None = None,
    phases: tuple[Callable[..., Any], ...] = (Checkpoints.save,),
) -> Ran:
    """Run `work(*arguments)`, to its end or to the call of that number. An exception in it is an AssertionError.

    phases: functions whose spans are noted.
    """
    receiver, sender = _context.Pipe(duplex=False)
    if not _ended(_context.Process(target=_counted, args=(sender, kill_at, phases, work, *arguments)), work):
        return Ran(killed=True)
    ran: Ran = receiver.recv()
    return ran


def finish_apart(work: Callable[..., None], *arguments: Any) -> None:
    """The same to its end without counting, which makes a run of tiny models some times slower."""
    assert _ended(_context.Process(target=_run, args=(work, *arguments)), work)


def _ended(process: Any, work: Callable[..., None]) -> bool:
    """By itself, and not by SIGKILL."""
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"{work.__name__} ended with exit code {process.exitcode}"
    return bool(process.exitcode == 0)


def moments(ran: Ran, seed: int, anywhere: int, while_saving: int) -> list[int]:
    """Counts to kill at: some from anywhere in a run like this one, some from within the write of a checkpoint."""
    draw = random.Random(seed)
    chosen = [draw.randint(1, ran.calls) for _ in range(anywhere)]
    return chosen + within(ran.saves, draw, while_saving)


def within(spans: list[tuple[int, int]], draw: random.Random, count: int) -> list[int]:
    return [draw.randint(*draw.choice(spans)) for _ in range(count)]


def kill_and_finish(
    work: Callable[[Path], None], lay_out: Callable[[str], Path], stage: str, *, saves: int, seed: int
) -> None:
    """Killed twice at any moment, a stage ends with what an uninterrupted run wrote; `saves`: its checkpoints.

    work: runs the stage in a folder; lay_out: makes the folder of that name, with what the stage reads.
    """
    whole = lay_out("whole")
    ran = run_apart(work, whole)
    assert len(ran.saves) == saves
    expected = written_by(whole, stage)
    assert {Path(name).suffix for name in expected} >= {".safetensors", ".csv"}
    kills = resumed = half_written = 0
    for number, first in enumerate(moments(ran, seed=seed, anywhere=3, while_saving=3)):
        root = lay_out(str(number))
        for kill_at in (first, ran.calls // 3, None):  # killed, killed again, and then to the end
            resumed += any(root.glob(f".rlhf/checkpoints/{stage}/*/step-*"))
            half_written += any(root.glob(f".rlhf/checkpoints/{stage}/*/.tmp-*"))
            if kill_at is None:
                finish_apart(work, root)
            else:
                kills += run_apart(work, root, kill_at=kill_at).killed
        assert written_by(root, stage) == expected, f"killed at {first}, then at {ran.calls // 3}"
    assert kills >= 10
    assert resumed >= 6
    assert half_written >= 1


def written_by(root: Path, stage: str) -> dict[str, str]:
    """{path: SHA-256} of what a stage has written in this folder; no half-written file or checkpoint is left there."""
    assert not list(root.rglob(".tmp-*"))
    assert not list(root.glob(".rlhf/checkpoints/*/*"))
    files = [file for out in load_stages()[stage].outs for file in [root / out, *(root / out).rglob("*")]]
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }


def _run(work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)  # tiny models gain nothing by more, and lose where the machine is busy
    work(*arguments)


def _counted(
    sender: Connection,
    kill_at: int | None,
    phases: tuple[Callable[..., Any], ...],
    work: Callable[..., None],
    *arguments: Any,
) -> None:
    counter = _Counter(kill_at, phases)
    sys.setprofile(counter)
    _run(work, *arguments)
    sys.setprofile(None)
    sender.send(Ran(calls=counter.calls, spans=counter.spans))


class _Counter:
    def __init__(self, kill_at: int | None, phases: tuple[Callable[..., Any], ...]) -> None:
        self.kill_at, self.calls, self.counting = kill_at, 0, False
        self.names = {phase.__code__: phase.__qualname__ for phase in phases}
        self.spans: dict[str, list[tuple[int, int]]] = {name: [] for name in self.names.values()}
        self.started: dict[str, int] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is Checkpoints.latest.__code__:
            self.counting = True
        if not self.counting:
            return
        if event in ("call", "c_call"):
            self.calls += 1
            if self.calls == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        name = self.names.get(frame.f_code)
        if name is not None and event == "call":
            self.started[name] = self.calls
        if name is not None and event == "return":
            self.spans[name].append((self.started[name], self.calls))
