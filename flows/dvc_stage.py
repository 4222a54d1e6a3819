"""One DVC stage as one Prefect task: `dvc repro --single-item STAGE` in a process of its own.

DVC decides whether there is anything to do; this module starts it, shows what it prints, and tells Prefect
how it ended.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil
from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.runtime import task_run as this_task_run
from prefect.states import Cancelled, Completed, Failed

from flows.console import Bar
from flows.server import leashed
from flows.workspace import absent_within
from tasks.lineage import StageSpec

LOCK_WAIT_SECONDS = 600.0
LOCK_POLL_SECONDS = 5.0
ERROR_LINES = 15
WAITS = "WaitsForLabels"  # the name of a state: people must label something before a stage can go on
STAGE_COLUMNS = 14  # of the terminal, before a progress bar


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    status: Literal["ran", "cached", "failed", "waits", "not run"]
    seconds: float | None = None
    told: str = ""  # why it failed or what it waits for, in the stage's own last lines


def dvc_stage(spec: StageSpec) -> Task[[StageSpec, Pool, dict[str, str]], State[Outcome]]:
    """The Prefect task that brings the stage up to date, named as the stage, with the retries that dvc.yaml sets."""
    return _bring_up_to_date.with_options(
        name=spec.name,
        retries=spec.meta.get("retries", 0),
        retry_delay_seconds=spec.meta.get("retry_delay_seconds", 5),
    )


def outcome_of(state: State[Any]) -> Outcome:
    """What the stage's task ended as. A task whose upstream failed stays pending for ever: it is not run."""
    if state.is_pending():
        return Outcome("not run")
    result = state.result(raise_on_failure=False)
    return result if isinstance(result, Outcome) else Outcome("failed", told=state.message or repr(result))


def _may_mend_itself(_task: Task[Any, Any], _run: TaskRun, state: State[Outcome]) -> bool:
    """A user's mistake or a stop from outside is the same at the next try."""
    return not (state.message or "").startswith("error: stage") and state.name != "Stopped"


# DVC is the only cache: Prefect must not decide a second time
@task(task_run_name="{spec.name}", cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=_may_mend_itself)
def _bring_up_to_date(spec: StageSpec, pool: Pool, ids: dict[str, str]) -> State[Outcome]:
    if spec.name in pool.unchanged:
        return _cached(0.0)
    logger = get_run_logger()
    limit = 60 * float(spec.meta.get("timeout_minutes", math.inf))
    with pool.room_for(spec.name, float(spec.meta.get("memory_gb", 0)), spec.meta.get("cores") == "all", logger.info):
        started = time.monotonic()
        ids = ids | {"RLHF_TASK_RUN_ID": str(this_task_run.get_id() or "")}
        code, lines = _run_dvc(spec, pool, ids, started + limit)
    seconds = time.monotonic() - started
    if pool.stopped:
        return Failed(name="Stopped", message="the flow was stopped", data=Outcome("failed", seconds, "stopped"))
    if code != 0:
        return _without_success(lines, seconds, limit)
    if stage_started(spec.name, lines):
        return Completed(message=f"{seconds:.1f} s", data=Outcome("ran", seconds))
    return _cached(seconds)


def _without_success(lines: list[str], seconds: float, limit: float) -> State[Outcome]:
    if seconds >= limit:
        error = f"stopped after {limit / 60:g} minutes: `timeout_minutes` of the stage in dvc.yaml"
        return Failed(name="TimedOut", message=error, data=Outcome("failed", seconds, error))
    told = told_by(lines)
    if waits := re.match(r"waits: stage `[^`]+`: ", told):  # no failure, and what comes after it is not run
        told = told[waits.end() :]
        return Cancelled(name=WAITS, message=told, data=Outcome("waits", seconds, told))
    return Failed(message=told, data=Outcome("failed", seconds, told))


def _cached(seconds: float) -> State[Outcome]:
    return Completed(name="Cached", message="nothing that it reads has changed", data=Outcome("cached", seconds))


def unchanged(parents: Mapping[str, set[str]]) -> frozenset[str]:
    """The stages that are up to date, and all before them: one `dvc status` is cheaper than a DVC process for each.

    parents: the stages that each stage reads from. None where DVC cannot tell, because somebody else's is at work, say:
    then each stage asks for itself.
    """
    done = subprocess.run(
        leashed([sys.executable, "-m", "dvc", "status", "--json"]), capture_output=True, encoding="utf-8", check=False
    )
    try:
        changed = set(json.loads(done.stdout)) if done.returncode == 0 else set(parents)
    except ValueError:
        changed = set(parents)
    for stage in TopologicalSorter(parents).static_order():
        if parents[stage] & changed:
            changed.add(stage)
    return frozenset(parents) - changed


def _run_dvc(spec: StageSpec, pool: Pool, ids: dict[str, str], until: float) -> tuple[int, list[str]]:
    """(exit code, printed lines); tried again while somebody else's DVC is at the same files. `until`: its last moment.

    Where the pool pulls, DVC fetches what an outdated stage reads, and nothing for one that is up to date.
    """
    logger = get_run_logger()
    stage = spec.name
    bar = Bar(stage, logger)
    if pool.pull and (absent := absent_within(Path(), spec.data_deps)):
        with pool.start(["dvc", "--wait-for-lock", "pull", "--quiet", *absent], ids) as process:
            process.communicate()  # what could not be had is told by the stage that lacks it
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        lines: list[str] = []
        pull = ["--pull", "--allow-missing"] if pool.pull else []
        command = ["dvc", "--wait-for-lock", "repro", "--single-item", *pull, stage]
        with pool.start(command, ids) as process, ended_at(process, until):
            assert process.stdout
            for kind, text in split_output(process.stdout.fileno()):
                if kind == "progress":
                    bar.show(text)
                elif text and not pool.stopped and not is_dvc_chatter(text):
                    lines.append(text)
                    logger.info(text)
            bar.show("")
            code = process.wait()
        busy = code != 0 and not stage_started(stage, lines) and any(_LOCKED.search(line) for line in lines)
        if not busy or pool.stopped or time.monotonic() > deadline:
            return code, lines
        logger.info("another DVC process works on the same files; trying again in %g s", LOCK_POLL_SECONDS)
        time.sleep(LOCK_POLL_SECONDS)


class Pool:
    """The DVC processes of one flow: as many at once as fit, and none left when the flow ends.

    Two stages that calculate on all cores never run at once: torch's threads wait for each other's cores. On two cores
    baseline and ppo of a quick run took 107 s together, and 52 s in turn."""

    def __init__(self, pull: bool = False, unchanged: frozenset[str] = frozenset()) -> None:
        self.pull = pull  # data may be missing here, and are in DVC's cache or remote
        self.unchanged = unchanged  # stages that need no process
        self.stopped = False
        self._changed = threading.Condition()
        self._running: dict[str, float] = {}  # stage -> GB that it may take
        self._has_cores = ""  # the stage that has all cores
        self._capacity = 0.0
        self._processes: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        with self._changed:
            self.stopped = True
            for process in self._processes:
                process.terminate()
            self._changed.notify_all()

    @contextmanager
    def room_for(self, stage: str, gigabytes: float, all_cores: bool, say: Any) -> Iterator[None]:
        """Wait until the stage fits beside those that run. Alone it may always start."""
        with self._changed:
            if lacks := self._lacks(gigabytes, all_cores):
                say(f"waits for {lacks}")
            self._changed.wait_for(lambda: self.stopped or not self._lacks(gigabytes, all_cores))
            if not self._running:
                self._capacity = available_gigabytes()
            self._running[stage] = gigabytes
            if all_cores:
                self._has_cores = stage
        try:
            yield
        finally:
            with self._changed:
                del self._running[stage]
                if all_cores:
                    self._has_cores = ""
                self._changed.notify_all()

    def _lacks(self, gigabytes: float, all_cores: bool) -> str:
        if self._running and sum(self._running.values()) + gigabytes > self._capacity:
            return f"memory: needs {gigabytes:g} GB beside {', '.join(self._running)}"
        if all_cores and self._has_cores:
            return f"the cores, which {self._has_cores} calculates on"
        return ""

    @contextmanager
    def start(self, command: list[str], ids: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """The command on its leash, with the flow's environment first in PATH and its output in one pipe."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = os.environ | ids | {"PATH": path, "PYTHONUNBUFFERED": "1", "TQDM_NCOLS": bar_columns()}
        with self._changed:
            process = subprocess.Popen(
                leashed(["true"] if self.stopped else command, spare=True),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the flow, which passes it on in order
            )
            self._processes.add(process)
        try:
            yield process
        except BaseException:
            process.terminate()  # nobody reads what it prints any more
            raise
        finally:
            process.wait()
            assert process.stdout
            process.stdout.close()
            with self._changed:
                self._processes.discard(process)


@contextmanager
def ended_at(process: subprocess.Popen[bytes], moment: float) -> Iterator[None]:
    """Stop the process when its time is up: the leash asks all below it to stop, and kills what does not."""
    if math.isinf(moment):
        yield
        return
    timer = threading.Timer(max(0.0, moment - time.monotonic()), process.terminate)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def bar_columns() -> str:
    """Of a stage's progress bar: it stands beside the stage's name on the terminal, or in a log."""
    columns = os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 120
    return str(max(66, columns - STAGE_COLUMNS))


def available_gigabytes() -> float:
    """What may still be used, by the machine and by the control group that we are in (Docker, systemd)."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text(encoding="utf-8")))
    except OSError:  # not Linux, or no control groups v2
        pass
    return free / 1e9


def split_output(fd: int) -> Iterator[tuple[Literal["line", "progress"], str]]:
    """Whole lines, and the states of a progress bar (tqdm redraws it after a carriage return), as they come."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    text, in_bar = "", False
    while data := os.read(fd, 65536):
        *ended, text = re.split(r"(?<=[\r\n])", (text + decode(data)).replace("\r\n", "\n"))
        for part in ended:
            in_bar = part.endswith("\r")
            clean = _plain(part)
            if not in_bar:
                yield "line", clean
            elif clean:
                yield "progress", clean
        if in_bar and text.strip():  # the bar as it stands, until its next state comes
            yield "progress", _plain(text)
    if text.strip():
        yield "line", _plain(text)


def _plain(text: str) -> str:
    return _ESCAPES.sub("", text).rstrip()


def stage_started(stage: str, lines: list[str]) -> bool:
    return f"Running stage '{stage}':" in lines


def told_by(lines: list[str]) -> str:
    """The stage's own words on why it failed or what it waits for; DVC's where the stage did not even start."""
    told = next((index for index, line in enumerate(lines) if line.startswith(("error: stage", "waits: stage"))), None)
    own = [line for line in lines if not _DVC_WORDS.match(line)]
    if told is not None:
        own = [line for line in lines[told:] if not _DVC_WORDS.match(line)]
    return "\n".join((own or lines)[-ERROR_LINES:]) or "it printed nothing"


def is_dvc_chatter(line: str) -> bool:
    return bool(_CHATTER.match(line))


_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LOCKED = re.compile(r"Unable to acquire lock|is busy, it is being blocked by")
_DVC_WORDS = re.compile(r"Running stage '|> |ERROR: failed to reproduce")
_CHATTER = re.compile(
    r"(Updating|Generating) lock file|Use `dvc push`|To track the changes with git|\s*git add |"
    r"WARNING: '[^']+' is empty\.|ERROR: failed to reproduce '[^']+': failed to run: .*, exited with 3$|"  # it waits
    r"To enable auto staging|\s*dvc config core.autostage|Data and pipelines are up to date|Verifying data sources"
)
