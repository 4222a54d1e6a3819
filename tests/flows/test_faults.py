"""What goes wrong in production, on the real processes: a worker, its server, the toy repository."""

from __future__ import annotations

import time
from pathlib import Path

from flows.server import free_port
from tests.flows.conftest import serving
from tests.flows.sites import Site
from tests.flows.toy import PATIENCE, Toy, ask, wait_until
from tests.tiny import shell


def test_a_killed_worker_leaves_a_crashed_run_and_the_next_one_goes_on(site: Site) -> None:
    with site.worker(TOY_SECONDS_last="120") as worker:
        run = site.start()
        assert wait_until(lambda: site.starts("last", run) == 1), site.logs()
        worker.kill()
        killed = time.monotonic()
        assert site.ended(run, 120)["type"] == "CRASHED"
        assert time.monotonic() - killed < 120
    site.clean()
    with site.worker("second"):
        again = site.start()
        assert site.ended(again)["type"] == "COMPLETED", site.logs()
    # the first two were done: DVC's run cache, which all workspaces share, has them
    lock = shell(site.root, "git", "show", f"runs/{again}:dvc.lock")
    assert "last.txt" in lock
    site.clean()


def test_two_workers_do_not_run_the_same_run(site: Site) -> None:
    with site.worker("one"), site.worker("two"):
        runs = [site.start(params={"toy.size": size}) for size in (2, 3)]
        for run in runs:
            assert site.ended(run)["type"] == "COMPLETED", site.logs()
    told = site.logs()
    for run in runs:
        assert told.count(f"Submitting flow run '{run}'") <= 2
        assert shell(site.root, "git", "rev-list", "--count", f"HEAD..runs/{run}").strip() == "2"  # parameters, results
    site.clean()


def test_a_stage_on_a_machine_of_its_own_size(site: Site) -> None:
    with site.worker():
        run = site.start(elsewhere={"last": "pipeline/large"}, params={"toy.size": 4})
        assert site.ended(run)["type"] == "COMPLETED", site.logs()
    branches = shell(site.root, "git", "branch", "--list", "--format=%(refname:short)", "runs/*").split()
    other = next(branch for branch in branches if branch != f"runs/{run}")
    assert shell(site.root, "git", "rev-parse", other) == shell(site.root, "git", "rev-parse", f"runs/{run}")
    assert shell(site.root, "git", "rev-list", "--count", f"HEAD..{other}").strip() == "3"  # parameters, before, last
    site.clean()


def test_a_stage_that_hangs_is_stopped(site: Site) -> None:
    site.toy.write(left="retries: 0, timeout_minutes: 0.05")
    shell(site.root, "git", "commit", "--quiet", "-am", "Impatient")
    with site.worker(TOY_SECONDS_left="300"):
        run = site.start()
        state = site.ended(run)
        assert state["type"] == "FAILED", site.logs()
        assert "failed: left" in state["message"]
    site.clean()


# ---- Prefect's server ----


def test_prefect_is_gone_for_a_while(toy: Toy, tmp_path: Path) -> None:
    home, port = tmp_path / "server", free_port()
    home.mkdir()
    with serving(home, port) as api:
        flow = toy.popen(PREFECT_API_URL=api, TOY_SECONDS_left="8", TOY_SECONDS_last="30")
        assert wait_until(lambda: toy.starts("left") == 1)
    time.sleep(10)  # `left` ends and `last` begins without it
    assert wait_until(lambda: toy.starts("last") == 1)
    with serving(home, port) as api:
        output, _ = flow.communicate(timeout=PATIENCE)
        assert flow.returncode == 0, output
        assert "Traceback" not in output
        (run,) = ask(api, "flow_runs/filter", {})
        assert run["state_type"] == "COMPLETED"

        def states() -> dict[str, str]:
            return {one["name"]: one["state_type"] for one in ask(api, "task_runs/filter", {})}

        assert wait_until(lambda: states().get("last") == "COMPLETED"), states()
    assert toy.processes() == []


def test_prefect_is_gone_for_good(toy: Toy, tmp_path: Path) -> None:
    with serving(tmp_path, free_port()) as api:
        flow = toy.popen(PREFECT_API_URL=api, PREFECT_CLIENT_MAX_RETRIES="1", TOY_SECONDS_left="5")
        assert wait_until(lambda: toy.starts("left") == 1)
    output, _ = flow.communicate(timeout=PATIENCE)
    assert flow.returncode == 2, output
    assert "error: Prefect's server does not answer" in output
    assert "Traceback" not in output
    assert toy.processes() == []
    again = toy.popen()  # with a server of its own
    output, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert [toy.starts(stage) for stage in ("left", "right", "last")] == [1, 1, 1], (
        "nothing that was done is done again"
    )
    assert toy.processes() == []
