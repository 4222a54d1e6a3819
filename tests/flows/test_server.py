"""Prefect's server for real: schedules (some versions of its dependencies stop them in silence), and our own server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.server import prefect_server
from tests.flows.toy import Toy, ask, wait_until

SERVE = """
from datetime import timedelta
from flows.rlhf import rlhf
rlhf.serve(name="nightly", interval=timedelta(days=1), limit=1)
"""


def test_a_scheduled_run_appears(toy: Toy, prefect_api: str) -> None:
    environment = os.environ | toy.environment | {"PREFECT_API_URL": prefect_api, toy.mark: "1"}
    command = [sys.executable, "-c", SERVE]
    log = toy.root / "serve.log"

    def scheduled() -> list[dict[str, Any]]:
        wanted = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
        return [run for run in ask(prefect_api, "flow_runs/filter", wanted) if run["auto_scheduled"]]

    with log.open("wb") as output:
        serving = subprocess.Popen(command, cwd=toy.root, env=environment, stdout=output, stderr=output)
    try:
        assert wait_until(lambda: bool(scheduled())), log.read_text()
    finally:
        serving.send_signal(signal.SIGINT)
        serving.wait(60)
    assert toy.processes() == []


def test_a_server_that_is_set_is_used(in_toy: Toy, prefect_api: str) -> None:
    said: list[str] = []
    with prefect_server(said.append) as url:
        assert url == prefect_api
    assert said == []
    assert in_toy.processes() == []


def test_a_server_that_cannot_start_tells_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "nonsense://")
    home = {PREFECT_HOME: str(tmp_path / "home")}
    with (
        temporary_settings(home, restore_defaults={PREFECT_API_URL}),
        pytest.raises(RuntimeError, match="last words"),
        prefect_server(lambda _: None),
    ):
        pass
