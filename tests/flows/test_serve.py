"""`make serve` for real: servers, worker and deployments in one command, and all of it gone with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from flows.server import free_port
from tests.flows.toy import ROOT, Toy, ask, wait_until


@contextmanager
def served(toy: Toy, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """`python -m flows.serve` in the toy repository, and the addresses that it printed."""
    ports = [f"--mlflow-port={free_port()}", f"--prefect-port={free_port()}"]
    log = toy.root.parent / "serve.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "flows.serve", *ports, *arguments],
            cwd=toy.root,
            env=os.environ | toy.environment | {toy.mark: "1"},
            stdout=output,
            stderr=output,
            text=True,
        ) as process,
    ):
        try:
            assert wait_until(lambda: "Ctrl-C stops" in log.read_text() or process.poll() is not None), log.read_text()
            assert process.poll() is None, log.read_text()
            lines = [line.split() for line in log.read_text().splitlines()]
            yield process, {line[0]: line[-1] for line in lines if line[0] in ("MLflow", "Prefect")}
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@pytest.fixture
def repository(toy: Toy) -> Toy:
    for name in ("flows", "tasks", "prefect.yaml"):
        (toy.root / name).symlink_to(ROOT / name)
    (toy.root / "params.yaml").write_text("toy: {size: 1}\n")
    toy.environment["PREFECT_HOME"] = str(toy.root.parent / "prefect")  # the deployments are in its database
    return toy


def test_serve(repository: Toy) -> None:
    with served(repository) as (process, addresses):
        assert httpx.get(f"{addresses['MLflow']}/health").is_success
        assert all(address.startswith("http://127.0.0.1:") for address in addresses.values())
        found = ask(f"{addresses['Prefect']}/api", "deployments/filter", {})
        assert {one["name"] for one in found} == {
            *("nightly", "on-new-labels", "sweep", "variance", "data-efficiency", "replay", "prune")
        }
        nightly = next(one for one in found if one["name"] == "nightly")
        assert nightly["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
        pools = ask(f"{addresses['Prefect']}/api", "work_pools/filter", {})
        assert [(pool["name"], pool["type"]) for pool in pools] == [("rlhf", "process")]

        def workers() -> list[str]:
            found = ask(f"{addresses['Prefect']}/api", "work_pools/rlhf/workers/filter", {})
            return [one["status"] for one in found]

        assert wait_until(lambda: workers() == ["ONLINE"])
    assert process.returncode == 0
    assert repository.processes() == []


def test_pages_alone(repository: Toy) -> None:
    with served(repository, "--pages") as (process, addresses):
        assert httpx.get(f"{addresses['Prefect']}/api/health").is_success
        assert ask(f"{addresses['Prefect']}/api", "deployments/filter", {}) == []
    assert process.returncode == 0
    assert repository.processes() == []


def test_a_port_that_is_taken(repository: Toy) -> None:
    port = free_port()
    taken = subprocess.Popen([sys.executable, "-m", "http.server", "--bind=127.0.0.1", str(port)], cwd=repository.root)
    try:
        assert wait_until(lambda: answers(port))
        done = subprocess.run(
            [sys.executable, "-m", "flows.serve", "--pages", f"--mlflow-port={port}", f"--prefect-port={free_port()}"],
            cwd=repository.root,
            env=os.environ | repository.environment | {repository.mark: "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    finally:
        taken.kill()
        taken.wait()
    assert done.returncode == 2
    assert f"error: something answers at http://127.0.0.1:{port} already" in done.stderr
    assert "--mlflow-port" in done.stderr
    assert "Traceback" not in done.stderr
    assert repository.processes() == []


@pytest.mark.parametrize(
    ("api", "told"),
    [
        ("", "say which Prefect server: PREFECT_API_URL="),
        ("http://ann:token@127.0.0.1:9/api", "server at http://***@127"),
    ],
)
def test_deploying_to_nobody_is_told(repository: Toy, api: str, told: str) -> None:
    environment = os.environ | repository.environment | {"PREFECT_CLIENT_MAX_RETRIES": "0"}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [sys.executable, "-m", "flows.deploy"],
        cwd=repository.root,
        env=environment | ({"PREFECT_API_URL": api} if api else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "token" not in done.stderr
    assert "Traceback" not in done.stderr


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}").is_success
    except httpx.TransportError:
        return False
