"""Put the deployments of prefect.yaml on Prefect's server: `python -m flows.deploy`. It may be repeated.

Beside them: the work pool that they name, and an automation that marks runs as crashed which have stopped to say that
they live, so that a worker killed outright leaves no run behind that looks busy for ever.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import httpx
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings

from tasks.stage import UserError
from tasks.tracking import masked

POOL = os.environ.get("RLHF_POOL", "rlhf")
SILENT_SECONDS = 105  # three heartbeats, and some for a server that was restarted
ZOMBIES = "Runs that fell silent have crashed"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended")
# said by the watcher of a run that was suspended just now: its last heartbeat may have come after "Suspended"
STILL_WAITS = "rlhf.still-waits"


def deploy() -> list[str]:
    """The names of what was deployed, `flow/deployment`."""
    api = get_current_settings().api.url
    if not api:
        raise UserError("say which Prefect server: PREFECT_API_URL=http://127.0.0.1:4200/api")
    try:
        make_pool()
        make_automation()
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        raise UserError(f"Prefect's server at {masked(api)}: {masked(str(error)).splitlines()[0]}") from None
    home = {"RLHF_POOL": POOL, "RLHF_HOME": os.environ.get("RLHF_HOME", str(Path.cwd()))}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        env=os.environ | home | {"PREFECT_API_URL": api, "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise UserError(f"`prefect deploy` failed:\n{(done.stderr or done.stdout)[-3000:]}")
    return re.findall(r"Deployment '([^']+)' successfully created", done.stdout)


def make_pool() -> None:
    """A pool of processes where there is none of that name; one of Docker or Kubernetes jobs is left as it is."""
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))


def make_automation() -> None:
    """No heartbeat and no end for so long after a heartbeat: crashed, as Prefect's documentation advises. One that is
    there, of an earlier version of this, is brought up to date."""
    heartbeat = "prefect.flow-run.heartbeat"
    automation = Automation(
        name=ZOMBIES,
        trigger=EventTrigger(
            after={heartbeat},
            expect={heartbeat, STILL_WAITS, *(f"prefect.flow-run.{end}" for end in ENDS)},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message="It has not been heard of: its worker or machine is gone."
            )
        ],
    )
    with get_client(sync_client=True) as client:
        there = client.read_automations_by_name(ZOMBIES)
    if there:
        automation.id = there[0].id
        automation.update()
    else:
        automation.create()


def main() -> int:
    try:
        for name in deploy():
            print(f"deployed {name}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
