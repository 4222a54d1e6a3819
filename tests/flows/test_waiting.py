"""Runs that wait for people, on the toy repository: suspended without a process, and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from prefect.client.base import PrefectHttpxSyncClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Failed, Running

from flows import scheduled
from flows.deploy import STILL_WAITS, ZOMBIES, make_automation
from flows.dvc_stage import WAITS
from flows.prune import prune_workspaces
from flows.rlhf import main
from flows.server import free_port
from flows.waiting import MARK, Waiting, look_at
from flows.watch import Watcher
from tasks.labels.queue import QUEUES
from tests.flows.sites import Site
from tests.flows.toy import Toy, ask, wait_until
from tests.tiny import shell

pipeline: Any = scheduled.pipeline
sweep: Any = scheduled.sweep


def commit(root: Path) -> None:
    shell(root, "git", "add", ".")
    shell(root, "git", "commit", "--quiet", "--allow-empty", "-m", "Toy")


@pytest.fixture
def asking(in_toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    in_toy.ask_people()
    (in_toy.root / ".gitignore").write_text("/.rlhf/\n/.remote/\n__pycache__/\nlog-*\npid-*\n")
    monkeypatch.setattr("flows.rlhf.load_params", lambda _path: None)
    shell(in_toy.root, "git", "config", "user.email", "toy@example.com")
    shell(in_toy.root, "git", "config", "user.name", "Toy")
    commit(in_toy.root)
    return in_toy


def test_make_run_says_how_many_are_missing_and_goes_on(asking: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    asking.label("ann")
    assert main([]) == 3
    out, err = capsys.readouterr()
    assert "demonstrate waits for people:\n1 demonstration by people is missing" in out
    assert "`make label`" in out
    for word in ("failed", "Traceback", "error"):
        assert word not in out
    assert "Traceback" not in err
    assert asking.starts("last") == 0
    assert main(["--waits-ok"]) == 0, "for make, which would call it an error"

    asking.label("bo")
    assert main([]) == 0
    assert (asking.root / "demonstrate.txt").read_text() == "ann:gern bo:gern"
    assert asking.starts("left") == 1, "what was done is not done again"
    assert asking.starts("last") == 1


def test_dvc_repro_stops_there_and_goes_on_and_more_labels_run_only_what_reads_them(asking: Toy) -> None:
    repro = [sys.executable, "-m", "dvc", "repro", "--quiet"]
    stopped = subprocess.run(repro, cwd=asking.root, capture_output=True, text=True, check=False)
    assert stopped.returncode != 0
    assert "waits: stage `demonstrate`: " in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert asking.starts("last") == 0

    asking.label("ann")
    asking.label("bo")
    shell(asking.root, "dvc", "repro", "--quiet")
    assert asking.starts("last") == 1

    asking.label("cem")
    changed = json.loads(shell(asking.root, "dvc", "status", "--json"))
    assert set(changed) == {"demonstrate"}
    shell(asking.root, "dvc", "repro", "--quiet")
    assert asking.starts("left") == 1
    assert asking.starts("last") == 2
    assert "cem:gern" in (asking.root / "last.txt").read_text()


def test_called_from_python_it_ends_as_waiting_and_the_next_takes_what_people_did(asking: Toy) -> None:
    asking.label("ann")
    state = pipeline(return_state=True)
    assert (state.name, state.is_cancelled()) == (WAITS, True)
    assert "1 demonstration by people is missing: 0 of 1 items are done" in state.message, "ann's is taken"
    (_queue,) = asking.root.glob(f".rlhf/workspaces/*/{QUEUES}/demonstrate.json")
    asking.label("bo")
    again = pipeline(return_state=True)
    assert again.is_completed(), again.message
    labels = shell(asking.root, "git", "show", f"{again.result()['branch']}:data/labels/demonstrations.jsonl")
    assert labels == (asking.root / "data/labels/demonstrations.jsonl").read_text()
    assert "Labels: 2 judgments" in shell(asking.root, "git", "log", "--format=%s", again.result()["branch"])


def test_a_sweep_whose_points_wait(asking: Toy) -> None:
    state: Any = sweep({"demonstrate.human.fill_in": [False, True]}, return_state=True)
    assert (state.name, state.is_cancelled()) == (WAITS, True)
    assert state.message == "1 of 2 runs wait for people's labels: `make label`, then start it again"
    rows = state.result(raise_on_failure=False)
    assert [row["result"] for row in rows] == [WAITS, "Completed"]


# ---- with a worker ----


@pytest.fixture
def waiting_site(site: Site) -> Site:
    site.toy.ask_people()
    commit(site.root)
    return site


def run_until_suspended(site: Site, run: str) -> None:
    assert wait_until(lambda: site.state(run)["name"] == "Suspended"), (site.state(run), site.logs())


def artifacts(site: Site, run: str) -> list[str]:
    """What the run's page says of missing labels, the newest last."""
    wanted = {"artifacts": {"key": {"any_": ["rlhf-labels"]}, "flow_run_id": {"any_": [run]}}}
    found = ask(site.api, "artifacts/filter", wanted)
    return [one["data"] for one in sorted(found, key=lambda one: str(one["created"]))]


def test_it_is_suspended_and_goes_on_by_itself_when_the_labels_are_there(site: Site, waiting_site: Site) -> None:
    with site.worker():
        run = site.start()
        run_until_suspended(site, run)
    assert wait_until(lambda: site.toy.processes() == []), "nothing of it runs while it waits"
    assert (
        "**Labels by people that are missing: 2.** [Open the page](http://127.0.0.1:7861)" in artifacts(site, run)[-1]
    )
    with temporary_settings({PREFECT_API_URL: site.api}):
        watcher = Watcher(site.root)
        watcher.look()
        assert len(artifacts(site, run)) == 1, "nothing new, nothing told"
        site.toy.label("ann")
        watcher.look()
        watcher.look()
        assert len(artifacts(site, run)) == 2
        assert "**Labels by people that are missing: 1.**" in artifacts(site, run)[-1]
        assert site.state(run)["name"] == "Suspended"
        site.toy.label("bo")
        Watcher(site.root).look()  # another process than before
        assert site.state(run)["type"] == "SCHEDULED"
        watcher.look()
    with site.worker("second"):
        assert site.ended(run)["type"] == "COMPLETED", site.logs()
    labels = shell(site.root, "git", "show", f"runs/{run}:data/labels/demonstrations.jsonl")
    assert labels == (site.root / "data/labels/demonstrations.jsonl").read_text()
    assert "last.txt" in shell(site.root, "git", "show", f"runs/{run}:dvc.lock")
    assert not (site.root / ".rlhf/workspaces" / run).exists()


def test_resumed_by_hand_it_looks_again_and_simulated_labelers_may_fill_in(site: Site, waiting_site: Site) -> None:
    with site.worker():
        run = site.start(notification="custom-webhook/nobody")
        run_until_suspended(site, run)
        site.toy.label("ann")
        first = site.state(run)["id"]
        resume(site, run, {})
        assert wait_until(lambda: site.state(run)["name"] == "Suspended" and site.state(run)["id"] != first), (
            site.logs()
        )
        assert "that are missing: 1.**" in artifacts(site, run)[-1]
        assert site.said("the notification block `custom-webhook/nobody` did not work") == 1, "told once"
        resume(site, run, {"fill_in": True})
        assert site.ended(run)["type"] == "COMPLETED", site.logs()
    assert "fill_in: true" in shell(site.root, "git", "show", f"runs/{run}:params.yaml")
    assert ask(site.api, f"flow_runs/{run}")["run_count"] == 1, "a suspension is no retry"


def resume(site: Site, run: str, answer: dict[str, Any]) -> None:
    """As the form on Prefect's page does it."""
    assert ask(site.api, f"flow_runs/{run}/resume", {"run_input": answer})["status"] == "ACCEPT"


def test_a_run_that_waits_for_the_same_ends_at_once_and_one_with_other_parameters_does_not(
    site: Site, waiting_site: Site
) -> None:
    with site.worker():
        run = site.start()
        run_until_suspended(site, run)
        same = site.start()
        assert site.ended(same)["name"] == WAITS
        assert site.state(same)["message"] == f"the run {run} waits for the same labels already"
        assert not (site.root / ".rlhf/workspaces" / same).exists()
        other = site.start(targets=["last"])
        run_until_suspended(site, other)


def test_stages_that_run_elsewhere(site: Site, waiting_site: Site) -> None:
    with site.worker():
        run = site.start(elsewhere={"last": "pipeline/large"})
        run_until_suspended(site, run)
        site.toy.label("ann")
        site.toy.label("bo")
        with temporary_settings({PREFECT_API_URL: site.api}):
            Watcher(site.root).look()
        assert site.ended(run)["type"] == "COMPLETED", site.logs()
        assert "last.txt" in shell(site.root, "git", "show", f"runs/{run}:dvc.lock")


def test_people_label_where_the_run_is_and_not_elsewhere(site: Site, waiting_site: Site) -> None:
    with site.worker():
        run = site.start(elsewhere={"demonstrate": "pipeline/large"})
        assert site.ended(run)["type"] == "FAILED", site.logs()
    assert "`demonstrate` waits for people's labels" in site.state(run)["message"]
    assert "take it out of `elsewhere`" in site.state(run)["message"]


def test_a_suspended_run_is_no_dead_one(site: Site, waiting_site: Site) -> None:
    """The automation that finds dead runs by their silence is brought up to date where an older one is there."""
    with temporary_settings({PREFECT_API_URL: site.api}):
        (there,) = automations(site)
        there["trigger"]["expect"] = ["prefect.flow-run.heartbeat"]
        with PrefectHttpxSyncClient(base_url=site.api) as client:
            wanted = {key: there[key] for key in ("name", "description", "enabled", "trigger", "actions")}
            assert client.put(f"automations/{there['id']}", json=wanted).is_success
        make_automation()
    (now,) = automations(site)
    assert now["id"] == there["id"]
    assert {"prefect.flow-run.Suspended", STILL_WAITS} <= set(now["trigger"]["expect"])


def automations(site: Site) -> list[dict[str, Any]]:
    return [one for one in ask(site.api, "automations/filter", {}) if one["name"] == ZOMBIES]


def test_an_abandoned_run_goes_and_its_queue_with_it(site: Site, waiting_site: Site) -> None:
    with site.worker():
        run = site.start(label_days=30 / 86400)
        run_until_suspended(site, run)
    workspace = site.root / ".rlhf/workspaces" / run
    assert prune_workspaces(site.root, keep_days=0) == [], "it waits"
    assert site.ended(run)["message"] == "The flow was paused and never resumed."
    with temporary_settings({PREFECT_API_URL: site.api}):
        Watcher(site.root).look()
    assert not list(workspace.glob(f"{QUEUES}/*")), "nobody should label for it any more"
    assert prune_workspaces(site.root, keep_days=0) == [run]
    assert not workspace.exists()


HERE, ELSEWHERE = "http://127.0.0.1:1/api", "http://127.0.0.1:2/api"


@pytest.mark.parametrize(
    ("state", "server", "closes"),
    [
        (None, HERE, True),  # deleted on Prefect's page
        (None, ELSEWHERE, False),  # another server's: nothing is known of it
        (None, None, False),  # it does not wait: the same
        (Cancelled(), HERE, True),
        (Failed(), None, True),
        (Cancelled(name=WAITS), None, False),  # started from Python: the next start takes what people do
        (Running(), None, False),
    ],
    ids=["deleted", "elsewhere", "unknown", "cancelled", "failed", "waits", "running"],
)
def test_queues_of_runs_that_are_over_or_deleted_close(
    tmp_path: Path, state: State[Any] | None, server: str | None, closes: bool
) -> None:
    workspace = tmp_path / str(uuid.uuid4())
    queue = workspace / QUEUES / "rank.json"
    queue.parent.mkdir(parents=True)
    queue.write_text("{}")
    if server:
        waiting = Waiting(jobs=["rank"], form="x", until=time.time() + 60, server=server)
        (workspace / MARK).write_text(waiting.model_dump_json())
    run = FlowRun(flow_id=uuid.uuid4(), state=state) if state else None
    with temporary_settings({PREFECT_API_URL: HERE}):
        assert not look_at(run, workspace, tmp_path, Mock())
    assert queue.exists() != closes
    assert (workspace / MARK).exists() == (bool(server) and not closes)


def test_where_prefect_is_away_the_watcher_warns(asking: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    mark = asking.root / f".rlhf/workspaces/{uuid.uuid4()}" / MARK
    mark.parent.mkdir(parents=True)
    mark.write_text(Waiting(jobs=["demonstrate"], form="x", until=time.time() + 60).model_dump_json())
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        Watcher(asking.root).look()
    assert "warning: " in capsys.readouterr().err
    assert mark.exists()
