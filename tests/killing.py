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
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from tasks.checkpoints import Checkpoints
from tasks.lineage import load_stages


class Ran(NamedTuple):
    killed: bool
    calls: int = 0  # all that were counted
    saves: tuple[tuple[int, int], ...] = ()  # the counts at the start and at the end of each write of a checkpoint


# One server process imports what takes long, once; each run is a fork of it and starts in a moment
_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["trl.trainer.sft_trainer", "transformers.models.llama.modeling_llama", "peft", "pytest", "tasks.params"]
)


def run_apart(work: Callable[..., None], *arguments: Any, kill_at: int | None = None) -> Ran:
    """Run `work(*arguments)`, to its end or to the call of that number. An exception in it is an AssertionError."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(sender, kill_at, work, *arguments))
    process.start()
    sender.close()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return Ran(killed=True)
    assert process.exitcode == 0, f"{work.__name__} ended with exit code {process.exitcode}"
    ran: Ran = receiver.recv()
    return ran


def moments(ran: Ran, seed: int, anywhere: int, while_saving: int) -> list[int]:
    """Counts to kill at: some from anywhere in a run like this one, some from within the write of a checkpoint."""
    draw = random.Random(seed)
    chosen = [draw.randint(1, ran.calls) for _ in range(anywhere)]
    return chosen + [draw.randint(*draw.choice(ran.saves)) for _ in range(while_saving)]


def written_by(root: Path, stage: str) -> dict[str, str]:
    """{path: SHA-256} of what a stage has written in this folder; no half-written file or checkpoint is left there."""
    assert not list(root.rglob(".tmp-*"))
    assert not list(root.glob(".rlhf/checkpoints/*/*"))
    files = [file for out in load_stages()[stage].outs for file in [root / out, *(root / out).rglob("*")]]
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }


def _run(sender: Connection, kill_at: int | None, work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)  # tiny models gain nothing by more, and lose where the machine is busy
    counter = _Counter(kill_at)
    sys.setprofile(counter)
    work(*arguments)
    sys.setprofile(None)
    sender.send(Ran(False, counter.calls, tuple(counter.saves)))


class _Counter:
    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.calls, self.counting = kill_at, 0, False
        self.saves: list[tuple[int, int]] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is Checkpoints.latest.__code__:
            self.counting = True
        if not self.counting:
            return
        if event in ("call", "c_call"):
            self.calls += 1
            if self.calls == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        if frame.f_code is Checkpoints.save.__code__ and event == "call":
            self.started = self.calls
        if frame.f_code is Checkpoints.save.__code__ and event == "return":
            self.saves.append((self.started, self.calls))
