"""One Prefect server for all the tests, and a toy repository for each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows import server as flows_server
from tests.flows.sites import DEPLOYMENTS, Site
from tests.flows.toy import ROOT, STAGES, Toy
from tests.tiny import shell


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where Prefect and MLflow keep theirs during the tests."""
    folder = tmp_path_factory.mktemp("records")
    return {"PREFECT_HOME": str(folder / "prefect"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}


@contextmanager
def serving(folder: Path, port: int) -> Iterator[str]:
    """A whole Prefect server, with its scheduler in a hurry; gives the address of its API."""
    hurry = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"} | {
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
        "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", "--host=127.0.0.1", f"--port={port}"]
    log = folder / "server.log"
    url = f"http://127.0.0.1:{port}/api"
    with log.open("wb") as output:
        process = subprocess.Popen(
            flows_server.leashed(command), env=os.environ | hurry, stdout=output, stderr=output, start_new_session=True
        )
    try:
        flows_server.wait_until_healthy(process, url, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One for all the tests."""
    with serving(tmp_path_factory.mktemp("prefect-server"), flows_server.free_port()) as url:
        yield url


@pytest.fixture
def toy(tmp_path: Path, records: dict[str, str]) -> Iterator[Toy]:
    root = tmp_path / "repo"
    root.mkdir()
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / ".dvc").mkdir()
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, root / name)
    (root / "toy.py").write_text(STAGES)
    (root / "knob.txt").write_text("1")
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    toy = Toy(root, records | {"PYTHONPATH": path, "COLUMNS": "200"})
    toy.write()
    yield toy
    toy.end()


@pytest.fixture
def in_toy(toy: Toy, records: dict[str, str], prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """The toy repository as the current folder of this process, its flow runs reported to the tests' server."""
    monkeypatch.chdir(toy.root)
    for name, value in toy.environment.items():
        monkeypatch.setenv(name, value)
    with temporary_settings({PREFECT_API_URL: prefect_api, PREFECT_HOME: records["PREFECT_HOME"]}):
        yield toy
        flows_server.send_the_rest()


@pytest.fixture
def site(toy: Toy, prefect_api: str) -> Site:
    (toy.root / "params.yaml").write_text("toy: {size: 1}\n")
    (toy.root / ".gitignore").write_text("/.rlhf/\n__pycache__/\nlog-*\npid-*\n/.prefect/\n")
    (toy.root / "prefect.yaml").write_text(DEPLOYMENTS)
    (toy.root / "flows").symlink_to(ROOT / "flows")
    (toy.root / "tasks").symlink_to(ROOT / "tasks")
    shell(toy.root, "git", "config", "user.email", "toy@example.com")
    shell(toy.root, "git", "config", "user.name", "Toy")
    shell(toy.root, "dvc", "remote", "add", "--quiet", "--force", "--default", "local", str(toy.root.parent / "remote"))
    shell(toy.root, "git", "add", ".")
    shell(toy.root, "git", "commit", "--quiet", "-m", "Toy")
    site = Site(toy, prefect_api)
    site.deploy()
    return site
