"""The servers on this machine alone, until Ctrl-C: `make serve`, or `python -m flows.serve [--pages]`.

MLflow's and Prefect's pages; with them a worker that runs the deployments of prefect.yaml, and a watcher that tells
Prefect of new labels and resumes runs that have waited for some (flows/watch.py). With --pages (`make ui`) the pages
alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows.deploy import POOL, deploy
from flows.server import PAGES_PORT, STARTUP_SECONDS, leashed
from flows.watch import Watcher
from tasks.labels.queue import page_address
from tasks.stage import UserError
from tasks.tracking import EXPERIMENT, masked, runs_url, tracking_uri

MLFLOW_PORT = 5000  # tasks/tracking.py prints links to it
# without job execution MLflow takes 2 processes and 0.5 GB, with it 10 and 2.5
QUIET = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


@dataclass(frozen=True)
class Child:
    """A process to start: `python -m COMMAND`. Without a command somebody else runs it."""

    name: str
    command: list[str]
    address: str = ""
    health: str = ""
    environment: dict[str, str] = field(default_factory=dict)


class Processes:
    """Children that end with this context, in the reverse order of their start, and with this process in any case."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for process in reversed(self.running):
            process.terminate()
            process.wait()

    def log(self, child: Child) -> Path:
        return self.logs / f"{child.name.lower()}.log"

    def start(self, child: Child) -> subprocess.Popen[bytes]:
        self.logs.mkdir(parents=True, exist_ok=True)
        with self.log(child).open("wb") as output:
            process = subprocess.Popen(
                leashed([sys.executable, "-m", *child.command]),
                env=os.environ | QUIET | child.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def wait_for(self, server: Child) -> None:
        """Until it answers; UserError when it does not."""
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline and all(process.poll() is None for process in self.running):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(server.address + server.health, timeout=5).is_success:
                    return
            time.sleep(0.3)
        raise UserError(f"no answer from {server.name} at {server.address}; see {self.log(server)}")

    def wait(self, now_and_then: Callable[[], object] | None = None, seconds: float = 60) -> int:
        """Until one of them ends, which none should."""
        called = -seconds
        while all(process.poll() is None for process in self.running):
            if now_and_then is not None and time.monotonic() - called >= seconds:
                now_and_then()
                called = time.monotonic()
            time.sleep(0.5)
        print(f"error: a server has ended; see the logs in {self.logs}", file=sys.stderr)
        return 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--pages", action="store_true", help="MLflow's and Prefect's pages alone, nothing runs")
    parser.add_argument("--mlflow-port", type=int, default=MLFLOW_PORT)
    parser.add_argument("--prefect-port", type=int, default=PAGES_PORT)
    parser.add_argument("--watch-seconds", type=float, default=60, help="how often to look for new labels")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("starting; this takes up to a minute ...", flush=True)
    mlflow, prefect = servers(arguments.mlflow_port, arguments.prefect_port)
    api = f"{prefect.address}/api"
    try:
        with Processes(get_current_settings().home) as up, temporary_settings({PREFECT_API_URL: api}):
            for server in (mlflow, prefect):
                if server.command:
                    refuse_taken(server)
                    up.start(server)
            for server in (mlflow, prefect):
                up.wait_for(server)
                print(f"{server.name:<8} {server.address}", flush=True)
            if address := list_of_runs(mlflow):
                print(f"runs     {address}", flush=True)
            if arguments.pages:
                print(f"Ctrl-C stops both. To see a run live: PREFECT_API_URL={api} make run", flush=True)
                return up.wait()
            for name in deploy():
                print(f"deployed {name}", flush=True)
            up.start(worker(client_environment(api, mlflow.address)))
            print(f"worker   takes runs from the pool `{POOL}`; logs: {up.logs.resolve()}")
            print(f"people   where a run waits for their labels: `make label`, then {page_address()}")
            print(f"Ctrl-C stops all of it. To run now: PREFECT_API_URL={api} prefect deployment run pipeline/nightly")
            sys.stdout.flush()
            return up.wait(Watcher(Path()).look, arguments.watch_seconds)
    except KeyboardInterrupt:
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def refuse_taken(server: Child) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", int(server.address.rpartition(":")[2]))) == 0:
            raise UserError(
                f"something answers at {server.address} already: another `make serve`? Stop it, or choose another "
                f"port: make serve ARGS=--{server.name.lower()}-port=N"
            )


def servers(mlflow_port: int, prefect_port: int) -> tuple[Child, Child]:
    """MLflow's and Prefect's."""
    store = tracking_uri()
    mlflow = ["mlflow", "server", "--host=127.0.0.1", f"--port={mlflow_port}", "--workers=1"]
    prefect = ["prefect", "server", "start", "--host=127.0.0.1", f"--port={prefect_port}"]
    address = f"http://127.0.0.1:{mlflow_port}"
    return (
        Child("MLflow", [], masked(store).rstrip("/"), "/health")
        if store.startswith("http")
        else Child("MLflow", mlflow, address, "/health", {"MLFLOW_BACKEND_STORE_URI": store}),
        Child("Prefect", prefect, f"http://127.0.0.1:{prefect_port}", "/api/health"),
    )


def list_of_runs(mlflow: Child) -> str:
    """The address of MLflow's list of runs; "" before the first run, or where MLflow asks for a login."""
    api = tracking_uri() if tracking_uri().startswith("http") else mlflow.address
    asked = f"{api}/api/2.0/mlflow/experiments/get-by-name"
    answer = httpx.get(asked, params={"experiment_name": EXPERIMENT}, timeout=10)
    if not answer.is_success:
        return ""
    return runs_url(f"{mlflow.address}/#/experiments/{answer.json()['experiment']['experiment_id']}/runs/")


def worker(environment: dict[str, str]) -> Child:
    return Child("worker", ["prefect", "worker", "start", f"--pool={POOL}"], environment=environment)


def client_environment(api: str, mlflow: str) -> dict[str, str]:
    """What a run must know: where both servers are, and that it must say now and then that it lives."""
    store = tracking_uri()
    return {
        "PREFECT_API_URL": api,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "MLFLOW_TRACKING_URI": store if store.startswith("http") else mlflow,
    }


if __name__ == "__main__":
    sys.exit(main())
