"""The toy repository with deployments, as workers run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect.client.base import PrefectHttpxSyncClient

from tests.flows.toy import Toy, ask, wait_until
from tests.tiny import shell

DEPLOYMENTS = """
name: toy
pull:
  - prefect.deployments.steps.set_working_directory: {directory: "{{ $RLHF_HOME }}"}
deployments:
  - name: nightly
    entrypoint: flows/scheduled.py:pipeline
    work_pool: {name: "{{ $RLHF_POOL }}"}
  - name: large
    entrypoint: flows/scheduled.py:pipeline
    work_pool: {name: "{{ $RLHF_POOL }}"}
"""
STATES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Site:
    """The toy repository with its deployment on a server, and workers."""

    def __init__(self, toy: Toy, api: str) -> None:
        self.toy, self.api = toy, api
        self.environment = (
            os.environ
            | toy.environment
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PREFECT_API_URL": api,
                "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "RLHF_POOL": f"pool-{toy.mark[-8:]}",
                toy.mark: "1",
            }
        )

    @property
    def root(self) -> Path:
        return self.toy.root

    def prefect(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(self) -> None:
        """By the command; what another test has put on this server that way is moved here, which takes a moment."""
        there = ask(self.api, "deployments/filter", {"flows": {"name": {"any_": ["pipeline"]}}})
        if not there:
            self.prefect("flows.deploy")
            return
        pool = self.environment["RLHF_POOL"]
        here = [{"prefect.deployments.steps.set_working_directory": {"directory": str(self.root)}}]
        with PrefectHttpxSyncClient(base_url=self.api) as client:
            assert client.post("work_pools/", json={"name": pool, "type": "process"}).is_success
            for one in there:
                wanted = {"work_pool_name": pool, "pull_steps": here}
                assert client.patch(f"deployments/{one['id']}", json=wanted).is_success

    @contextmanager
    def worker(self, name: str = "worker", **more: str) -> Iterator[subprocess.Popen[bytes]]:
        log = (self.root.parent / f"{name}.log").open("wb")
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", self.environment["RLHF_POOL"]]
        with (
            log,
            subprocess.Popen(
                [*command, "--name", name], cwd=self.root, env=self.environment | more, stdout=log, stderr=log
            ) as process,
        ):
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)

    def start(self, **parameters: Any) -> str:
        """The id of a new run of the deployment."""
        deployment = ask(self.api, "deployments/name/pipeline/nightly")["id"]
        wanted = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(ask(self.api, f"deployments/{deployment}/create_flow_run", wanted)["id"])

    def state(self, run: str) -> dict[str, Any]:
        try:
            state: dict[str, Any] = ask(self.api, f"flow_runs/{run}")["state"]
        except httpx.TransportError:
            return {"type": "UNKNOWN"}
        return state

    def ended(self, run: str, seconds: float = 180) -> dict[str, Any]:
        assert wait_until(lambda: self.state(run)["type"] in STATES, seconds), (self.state(run), self.logs())
        return self.state(run)

    def logs(self) -> str:
        return "\n".join(log.read_text()[-4000:] for log in self.root.parent.glob("*.log"))

    def said(self, text: str) -> int:
        """How often, in all that the servers and workers have printed."""
        return sum(log.read_text().count(text) for log in self.root.parent.glob("*.log"))

    def starts(self, stage: str, run: str) -> int:
        log = self.root / ".rlhf/workspaces" / run / f"log-{stage}.txt"
        return log.read_text().count("start") if log.exists() else 0

    def clean(self) -> None:
        """No process of ours, no lock, nothing changed in the repository."""
        assert wait_until(lambda: self.toy.processes() == [], 30), self.toy.processes()
        assert shell(self.root, "git", "status", "--porcelain") == ""
        for busy in self.root.rglob(".dvc/tmp/rwlock"):
            assert busy.read_text() in ("", "{}"), busy
