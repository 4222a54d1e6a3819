"""Stopping the flow in every way leaves no process, and a dvc.lock that the next run picks up."""

from __future__ import annotations

import shutil
import signal

import pytest
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tests.flows.toy import PATIENCE, Toy, wait_until


def _locked(toy: Toy) -> set[str]:
    """The stages in dvc.lock; none while DVC is writing it, which it does in place."""
    try:
        return set(YAML(typ="safe").load(toy.root / "dvc.lock")["stages"])
    except (FileNotFoundError, TypeError, YAMLError):
        return set()


# DVC runs a stage through $SHELL: none may stay between DVC and the stage, or be left behind
@pytest.mark.parametrize(
    ("how", "code", "shell"),
    [
        (signal.SIGINT, 130, "bash"),
        (signal.SIGTERM, 143, "dash"),
        (signal.SIGKILL, -9, "bash"),
        (signal.SIGKILL, -9, "dash"),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_no_orphan_and_the_next_run_goes_on(
    toy: Toy, how: signal.Signals, code: int, shell: str, prefect_api: str
) -> None:
    path = shutil.which(shell)
    if not path:
        pytest.skip(f"no {shell} here")
    # PREFECT_API_URL is not set: the flow starts its own server, which must go as well
    flow = toy.popen(SHELL=path, TOY_SECONDS_right="300")
    assert wait_until(lambda: "left" in _locked(toy) and toy.starts("right") == 1), flow.communicate(timeout=5)
    assert len(toy.processes()) >= 5  # flow, server, its leash, the stage's leash, dvc, stage

    flow.send_signal(how)
    output, _ = flow.communicate(timeout=PATIENCE)
    assert wait_until(lambda: not toy.processes()), toy.processes()
    assert flow.returncode == code
    assert "Traceback" not in output
    assert _locked(toy) == {"left"}

    again = toy.popen(SHELL=path, PREFECT_API_URL=prefect_api)
    output, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert _locked(toy) == {"left", "right", "last"}
    assert toy.starts("left") == 1
    assert toy.processes() == []
