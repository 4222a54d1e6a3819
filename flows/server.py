"""A Prefect server for as long as a run takes, where none is given by PREFECT_API_URL.

Prefect's own ephemeral server lives on as an orphan when the flow is killed, and gives up after 20 s where the first
start, with its migrations, takes longer. This one is started on a leash (flows/leash.py).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, get_current_settings, temporary_settings

from flows import leash

STARTUP_SECONDS = 180
PAGES_PORT = 4200  # of the server that is for people (flows/serve.py)


def leashed(command: list[str], **options: bool | float) -> list[str]:
    """The command line that runs `command` so that it ends with this process."""
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, leash.__file__, f"--parent={os.getpid()}", *flags, "--", *command]


@contextmanager
def prefect_server(say: Callable[[str], None]) -> Iterator[str]:
    """The address of the API: the one that is set, or that of a server which ends with this context."""
    if given := get_current_settings().api.url:
        yield given
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    log = get_current_settings().home / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    first = "" if (log.parent / "prefect.db").exists() else "; the first time takes up to a minute"
    say(f"starting a Prefect server for this run{first} ...")
    with log.open("wb") as output:
        process = subprocess.Popen(
            leashed(_uvicorn(port)), env=_environment(), stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until_healthy(process, url, log)
        # this server's address is gone with it; `make ui` shows the run at its own
        with temporary_settings({PREFECT_API_URL: url, PREFECT_UI_URL: f"http://127.0.0.1:{PAGES_PORT}"}):
            try:
                yield url
            finally:
                send_the_rest()
    finally:
        process.terminate()
        process.wait()


def _uvicorn(port: int) -> list[str]:
    app = ["--factory", "prefect.server.api.server:create_app"]
    return [sys.executable, "-m", "uvicorn", *app, f"--port={port}", "--host=127.0.0.1", "--log-level=error"]


def _environment() -> dict[str, str]:
    """Prefect's own switches for a server that is not for people: no page, no scheduler, no telemetry."""
    switches = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}
    return os.environ | switches | {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


def send_the_rest() -> None:
    """Logs and states go to the server from background threads; without this the last ones are lost with the server."""
    APILogWorker.drain_all(timeout=10)
    EventsWorker.drain_all(timeout=10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"Prefect's server did not start; its last words:\n{log.read_text(encoding='utf-8')[-2000:]}")
