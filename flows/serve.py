"""The servers on this machine alone, until Ctrl-C: `make serve`, or `python -m flows.serve [--pages]`.

MLflow's and Prefect's pages; with them a worker that runs the deployments of prefect.yaml, and a watcher that tells
Prefect of new labels (flows/watch.py). With --pages (`make ui`) the pages alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows.deploy import POOL, deploy
from flows.server import STARTUP_SECONDS, leashed
from flows.watch import Watcher
from tasks.stage import UserError
from tasks.tracking import masked, tracking_uri

MLFLOW_PORT = 5000  # tasks/tracking.py prints links to it
PREFECT_PORT = 4200
# without job execution MLflow takes 2 processes and 0.5 GB, with it 10 and 2.5
QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


class Child(NamedTuple):
    """A process of ours; where somebody else runs the server, none."""

    name: str
    command: list[str]
    address: str = ""
    health: str = ""

    @property
    def log(self) -> Path:
        return get_current_settings().home / f"{self.name.lower()}.log"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--pages", action="store_true", help="MLflow's and Prefect's pages alone, nothing runs")
    parser.add_argument("--watch-seconds", type=float, default=60, help="how often to look for new labels")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    running: list[subprocess.Popen[bytes]] = []
    print("starting; this takes up to a minute ...", flush=True)
    try:
        for server in servers():
            if server.command:
                running.append(start(server, {}))
        for server in servers():
            if not answers(server, running):
                print(f"error: no answer from {server.name} at {server.address}; see {server.log}", file=sys.stderr)
                return 1
            print(f"{server.name:<8} {server.address}", flush=True)
        api = f"{servers()[-1].address}/api"
        if arguments.pages:
            print(f"Ctrl-C stops both. To see a run live: PREFECT_API_URL={api} make run", flush=True)
            return wait(running, None, 0)
        with temporary_settings({PREFECT_API_URL: api}):
            for name in deploy():
                print(f"deployed {name}", flush=True)
            running.append(start(worker(), client_environment(api)))
            print(f"worker   takes runs from the pool `{POOL}`; log: {worker().log}")
            print("Ctrl-C stops all of it. To run one now: prefect deployment run pipeline/nightly", flush=True)
            return wait(running, Watcher(Path()), arguments.watch_seconds)
    except KeyboardInterrupt:
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        for child in reversed(running):  # the worker first, while the servers still take what it has to say
            child.terminate()
            child.wait()


def servers() -> list[Child]:
    store = tracking_uri()
    mlflow = ["mlflow", "server", "--host=127.0.0.1", f"--port={MLFLOW_PORT}", "--workers=1"]
    prefect = ["prefect", "server", "start", "--host=127.0.0.1", f"--port={PREFECT_PORT}"]
    return [
        Child("MLflow", [], masked(store).rstrip("/"), "/health")
        if store.startswith("http")
        else Child("MLflow", [*mlflow, f"--backend-store-uri={store}"], f"http://127.0.0.1:{MLFLOW_PORT}", "/health"),
        Child("Prefect", prefect, f"http://127.0.0.1:{PREFECT_PORT}", "/api/health"),
    ]


def worker() -> Child:
    return Child("worker", ["prefect", "worker", "start", f"--pool={POOL}", "--type=process"])


def client_environment(api: str) -> dict[str, str]:
    """What a run must know: where both servers are, and that it must say now and then that it lives."""
    store = tracking_uri()
    return {
        "PREFECT_API_URL": api,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "MLFLOW_TRACKING_URI": store if store.startswith("http") else f"http://127.0.0.1:{MLFLOW_PORT}",
    }


def start(child: Child, more: dict[str, str]) -> subprocess.Popen[bytes]:
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with child.log.open("wb") as output:
        return subprocess.Popen(
            leashed([sys.executable, "-m", *child.command]),
            env=os.environ | QUIET | more,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def answers(server: Child, running: list[subprocess.Popen[bytes]]) -> bool:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and all(child.poll() is None for child in running):
        try:
            if httpx.get(server.address + server.health, timeout=5).is_success:
                return True
        except httpx.TransportError:
            time.sleep(0.3)
    return False


def wait(running: list[subprocess.Popen[bytes]], watcher: Watcher | None, seconds: float) -> int:
    """Until one of them ends, which none should; meanwhile the watcher looks every so many seconds."""
    looked = -seconds
    while all(child.poll() is None for child in running):
        if watcher is not None and time.monotonic() - looked >= seconds:
            watcher.look()
            looked = time.monotonic()
        time.sleep(0.5)
    print(f"error: a server has ended; see the logs in {get_current_settings().home}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
