"""MLflow's and Prefect's pages on this machine alone, until Ctrl-C: `make ui`, or `python -m flows.ui`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx
from prefect.settings import get_current_settings

from flows.server import STARTUP_SECONDS, leashed

MLFLOW_PORT = 5000  # tasks/tracking.py prints links to it
PREFECT_PORT = 4200


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pages = _pages()
    # without job execution MLflow takes 2 processes and 0.5 GB, with it 10 and 2.5
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    print("starting; this takes up to a minute ...", flush=True)
    children = [_start(page, os.environ | quiet) for page in pages if page.command]
    try:
        for page in pages:
            if not _answers(page.address + page.health, children):
                print(f"error: no answer from {page.name} at {page.address}; see {page.log}", file=sys.stderr)
                return 1
            print(f"{page.name:<8} {page.address}", flush=True)
        print("Ctrl-C stops both. To see a run live: PREFECT_API_URL=http://127.0.0.1:4200/api make run", flush=True)
        while all(child.poll() is None for child in children):
            time.sleep(0.5)
        print("error: one of the two has ended", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


class Page(NamedTuple):
    name: str
    address: str
    health: str
    command: list[str]  # empty: somebody else runs it

    @property
    def log(self) -> Path:
        return get_current_settings().home / f"{self.name.lower()}-page.log"


def _pages() -> list[Page]:
    store = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    prefect = ["prefect", "server", "start", "--host=127.0.0.1", f"--port={PREFECT_PORT}"]
    mlflow = ["mlflow", "server", "--host=127.0.0.1", f"--port={MLFLOW_PORT}", "--workers=1"]
    return [
        Page("MLflow", store.rstrip("/"), "/health", [])
        if store.startswith("http")
        else Page("MLflow", f"http://127.0.0.1:{MLFLOW_PORT}", "/health", [*mlflow, f"--backend-store-uri={store}"]),
        Page("Prefect", f"http://127.0.0.1:{PREFECT_PORT}", "/api/health", prefect),
    ]


def _start(page: Page, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    page.log.parent.mkdir(parents=True, exist_ok=True)
    with page.log.open("wb") as output:
        return subprocess.Popen(
            leashed([sys.executable, "-m", *page.command]),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _answers(url: str, children: list[subprocess.Popen[bytes]]) -> bool:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and all(child.poll() is None for child in children):
        try:
            if httpx.get(url, timeout=5).is_success:
                return True
        except httpx.TransportError:
            time.sleep(0.3)
    return False


if __name__ == "__main__":
    sys.exit(main())
