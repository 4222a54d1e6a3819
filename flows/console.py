"""What a person sees while the flow runs: each stage's lines under its name, and its progress bar in place."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import prefect
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

PREFECT_FOLDER = str(Path(prefect.__file__).parent)
SECONDS_BETWEEN_LOGGED_BARS = 15
PATIENCE_SECONDS = 5.0  # with Prefect's server, for the last state of a bar
ENGINE_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")


class Terminal(logging.Handler):
    """Takes the place of Prefect's console handler. Prefect's page and API still get every record."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._bars: dict[str, str] = {}
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if record.name in ENGINE_LOGGERS and record.pathname.startswith(PREFECT_FOLDER):
            return  # the engine's own remarks: every end is shown in the table, every failure by its message
        stage = getattr(record, "task_run_name", "rlhf")
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = Text.assemble((clock, "dim"), " ", (f"{stage:<12}", "cyan"), " ", record.getMessage())
        self._live.console.print(line, soft_wrap=True)

    def bar(self, stage: str, text: str) -> None:
        """Redraw the stage's bar; an empty text takes it away."""
        self.acquire()
        try:
            self._bars.pop(stage, None)
            if text:
                self._bars[stage] = text
            rows = [Text(f"{name:<12} {bar}", no_wrap=True, overflow="ellipsis") for name, bar in self._bars.items()]
            self._live.update(Group(*rows), refresh=True)
        finally:
            self.release()

    def __enter__(self) -> Terminal:
        self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._live.stop()


@contextmanager
def terminal() -> Iterator[Console]:
    """Show the run on the terminal in place of Prefect's own log lines."""
    root = logging.getLogger()
    before = root.handlers[:]
    with Terminal(Console(stderr=True, highlight=False)) as handler:
        root.handlers = [handler]
        try:
            yield handler.console
        finally:
            root.handlers = before


class Bar:
    """A stage's progress bar: in place on a terminal, else a line in the log now and then; always on Prefect's page."""

    def __init__(self, stage: str, logger: Any) -> None:
        self._stage = stage
        self._logger = logger
        self._logged = self._published = -math.inf
        self._artifact: UUID | None = None
        self._publisher: threading.Thread | None = None
        handlers = logging.getLogger().handlers
        self._terminal = next((one for one in handlers if isinstance(one, Terminal) and one.console.is_terminal), None)

    def show(self, text: str) -> None:
        """The bar's new state; an empty text takes it away."""
        self._publish(text)
        if self._terminal:
            self._terminal.bar(self._stage, text)
        elif text and time.monotonic() - self._logged > SECONDS_BETWEEN_LOGGED_BARS:
            self._logged = time.monotonic()
            self._logger.info(text)

    def _publish(self, text: str) -> None:
        """As an artifact of the task run. The last state is 100 %: an empty text comes when the stage has ended.

        In a thread of its own: Prefect's server may be away, and the stage waits until what it prints is read.
        """
        share = re.search(r"(\d+)%", text)
        due = time.monotonic() - self._published > SECONDS_BETWEEN_LOGGED_BARS
        if (share is None and text) or (not text and self._artifact is None) or (text and not due):
            return
        if self._publisher is not None:
            self._publisher.join(0 if text else PATIENCE_SECONDS)
            if self._publisher.is_alive():
                return
        percent = float(share[1]) if share else 100.0
        self._published = time.monotonic()

        def publish() -> None:
            with contextlib.suppress(Exception):  # a bar is worth no failure
                if self._artifact is None:
                    self._artifact = cast(
                        "UUID", create_progress_artifact(percent, key=f"rlhf-{self._stage}", description=text)
                    )
                else:
                    update_progress_artifact(self._artifact, percent, description=text or f"{self._stage}: ended")

        # the artifact finds its task run in Prefect's context
        self._publisher = threading.Thread(target=copy_context().run, args=(publish,), daemon=True)
        self._publisher.start()
        if not text:
            self._publisher.join(PATIENCE_SECONDS)
