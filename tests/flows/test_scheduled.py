"""Scheduled runs on the toy repository, reporting to a real Prefect server."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.settings import get_current_settings
from ruamel.yaml import YAML

from flows import scheduled
from flows.scheduled import points
from flows.server import free_port
from tasks.lineage import hash_path
from tasks.stage import UserError
from tests.flows.toy import Toy, a_verdict, ask, wait_until
from tests.tiny import shell, small_disk

# their states hold a state's data: too much for Prefect's types
pipeline: Any = scheduled.pipeline
sweep: Any = scheduled.sweep
prune: Any = scheduled.prune

REGISTER = """
  register:
    cmd: python register.py
    deps: [register.py, last.txt]
    outs: [{data/reports/registered.json: {cache: false}}]
"""


@pytest.fixture
def repo(in_toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy with everything committed, parameters, and a last stage that tells what became of the champion."""
    root = in_toy.root
    (root / "dvc.yaml").write_text((root / "dvc.yaml").read_text() + REGISTER)
    (root / "params.yaml").write_text("toy: {size: 1, name: x}\n")
    (root / ".gitignore").write_text("/.rlhf/\n/.remote/\n__pycache__/\n")
    monkeypatch.setattr("flows.rlhf.load_params", lambda _path: None, raising=False)
    champion(root, "promoted")
    shell(root, "git", "config", "user.email", "toy@example.com")
    shell(root, "git", "config", "user.name", "Toy")
    shell(root, "dvc", "remote", "add", "--quiet", "--force", "--default", "local", str(root.parent / "remote"))
    commit(root)
    return in_toy


def champion(root: Path, what: str) -> None:
    told = {"champion": what, "policy": {"version": "3"}, "verdict": a_verdict(policy="policy/3", outcome=what)}
    (root / "register.py").write_text(
        "from pathlib import Path\nfile = Path('data/reports/registered.json')\n"
        f"file.parent.mkdir(parents=True, exist_ok=True)\nfile.write_text({json.dumps(told)!r})\n"
    )


def commit(root: Path) -> None:
    shell(root, "git", "add", ".")
    shell(root, "git", "commit", "--quiet", "--allow-empty", "-m", "Toy")


def untouched(root: Path) -> tuple[str, str]:
    return shell(root, "git", "rev-parse", "HEAD"), shell(root, "git", "status", "--porcelain")


@pytest.fixture
def webhook(repo: Toy) -> Iterator[list[str]]:
    """A notification block `custom-webhook/team`, and what it was sent."""
    received: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    block = CustomWebhookNotificationBlock(
        name="team", url=f"http://127.0.0.1:{server.server_port}/", json_data={"text": "{{subject}}: {{body}}"}
    )
    block.save("team", overwrite=True)
    yield received
    server.shutdown()
    server.server_close()


def test_a_run_in_its_own_workspace(repo: Toy, webhook: list[str]) -> None:
    before = untouched(repo.root)
    state = pipeline(params={"toy.size": 2}, notification="custom-webhook/team", return_state=True)
    assert state.is_completed(), state.message
    result = state.result()
    assert untouched(repo.root) == before
    assert not (repo.root / "last.txt").exists()
    assert not list((repo.root / ".rlhf/workspaces").glob("*/"))
    assert "size: 2" in shell(repo.root, "git", "show", f"{result['branch']}:params.yaml")
    assert "last.txt" in shell(repo.root, "git", "show", f"{result['branch']}:dvc.lock")
    assert len(webhook) == 1
    assert "policy/3 is the champion now" in webhook[0]
    assert "PPO kept: update 6 of 8" in webhook[0]
    assert "Champion now" not in webhook[0], "it was asked for after the verdict"
    assert result["branch"] in webhook[0]
    # the next night: nothing is merged, so it finds the same out again, and tells nobody a second time
    assert pipeline(params={"toy.size": 2}, notification="custom-webhook/team", return_state=True).is_completed()
    assert len(webhook) == 1

    # nothing has changed since: every stage is cached, and no data come
    again = pipeline(revision=result["branch"], return_state=True)
    runs = task_states(again)
    assert {name: runs[name] for name in ("left", "right", "last")} == dict.fromkeys(
        ("left", "right", "last"), "Cached"
    )


def task_states(state: Any) -> dict[str, str]:
    """Of the stages of the flow run's last subflow, once they have all arrived at the server."""
    api = str(get_current_settings().api.url)

    def seen() -> dict[str, str]:
        parents = ask(api, "task_runs/filter", {"flow_runs": {"id": {"any_": [str(state.state_details.flow_run_id)]}}})
        children = [run for run in parents if run["state"]["state_details"]["child_flow_run_id"]]
        last = max(children, key=lambda run: str(run["created"]))  # each attempt has one
        id = last["state"]["state_details"]["child_flow_run_id"]
        runs = ask(api, "task_runs/filter", {"flow_runs": {"id": {"any_": [id]}}})
        return {run["name"]: run["state"]["name"] for run in runs}

    assert wait_until(lambda: len(seen()) == 4 and "Running" not in seen().values())
    return seen()


def test_imports_are_brought_up_to_date(repo: Toy, tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text("{}\n")
    (repo.root / "data/raw").mkdir(parents=True)
    shell(repo.root, "dvc", "import-url", "--quiet", str(source), "data/raw/source.jsonl")
    commit(repo.root)
    before = untouched(repo.root)
    source.write_text("{}\n{}\n")
    state = pipeline(update_imports=True, return_state=True)
    assert state.is_completed(), state.message
    now = shell(repo.root, "git", "show", f"{state.result()['branch']}:data/raw/source.jsonl.dvc")
    assert hash_path(source) in now
    assert hash_path(source) not in (repo.root / "data/raw/source.jsonl.dvc").read_text()
    assert untouched(repo.root) == before


def test_a_missed_gate_is_told(repo: Toy, webhook: list[str]) -> None:
    champion(repo.root, "refused: kl")
    commit(repo.root)
    assert pipeline(notification="custom-webhook/team", return_state=True).is_completed()
    assert "policy/3 missed its gates: kl" in webhook[0]


def test_a_failure_is_told_and_the_retry_goes_on_in_the_same_workspace(repo: Toy, webhook: list[str]) -> None:
    (repo.root / "fail-last.txt").write_text("mistake")
    commit(repo.root)
    flow = pipeline.with_options(retry_delay_seconds=0)
    state = flow(notification="custom-webhook/team", return_state=True)
    # the toy's stage fails once: the second attempt of the flow finds the others done
    assert state.is_completed(), state.message
    assert task_states(state) | {"register": ""} == {
        "left": "Cached",
        "right": "Cached",
        "last": "Completed",
        "register": "",
    }
    assert len(webhook) == 1, "what the retry mends is no failure"
    assert "is the champion now" in webhook[0]


def test_a_failure_that_stays_is_told_once(repo: Toy, webhook: list[str]) -> None:
    (repo.root / "fail-last.txt").write_text("mistake mistake mistake")
    commit(repo.root)
    state = pipeline.with_options(retries=1, retry_delay_seconds=0)(
        notification="custom-webhook/team", return_state=True
    )
    assert state.is_failed()
    assert len(webhook) == 1
    assert "The pipeline failed: failed: last" in webhook[0]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"revision": "nowhere"}, "has no commit `nowhere`"),
        ({"params": {"toy.sise": 2}}, "no key `toy.sise`; did you mean `toy.size`?"),
        ({"targets": ["lost"]}, "no stage `lost` in dvc.yaml; did you mean `last`?"),
        ({"elsewhere": {"lefd": "pipeline/large"}}, "no stage `lefd` in dvc.yaml; did you mean `left`?"),
    ],
)
def test_what_cannot_start_is_told_at_once(repo: Toy, webhook: list[str], wrong: dict[str, Any], told: str) -> None:
    state = pipeline(**wrong, notification="custom-webhook/team", return_state=True)
    assert (state.name, state.is_cancelled()) == ("Refused", True)
    assert told in state.message
    run = ask(str(get_current_settings().api.url), f"flow_runs/{state.state_details.flow_run_id}")
    assert run["run_count"] == 1, "no retry mends it"
    assert len(webhook) == 1
    assert told in webhook[0]


def test_a_notification_that_cannot_be_sent_stops_nothing(repo: Toy) -> None:
    assert pipeline(notification="custom-webhook/nobody", return_state=True).is_completed()


class Registry:
    """What the flow asks MLflow of a policy that failed none of its gates while policy/2 was the champion."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.champion = "2"
        self.decided: list[tuple[str, str, str, str]] = []
        monkeypatch.setattr("tasks.tracking.connect", lambda: self)
        monkeypatch.setattr("tasks.registry.champion", lambda _client: SimpleNamespace(version=self.champion))
        for what in ("promote", "decline"):
            monkeypatch.setattr(f"tasks.registry.{what}", partial(self.decide, what))

    def get_model_version(self, *_: str) -> SimpleNamespace:
        return SimpleNamespace(description="- kl: passed", tags={"gates.rival": "2"})

    def decide(self, what: str, _client: Any, number: str, *, author: str, reason: str) -> None:
        self.decided.append((what, number, author, reason))


@pytest.fixture
def registry(repo: Toy, monkeypatch: pytest.MonkeyPatch) -> Registry:
    champion(repo.root, "waits for approval")
    commit(repo.root)
    return Registry(monkeypatch)


@pytest.mark.parametrize("approve", [True, False])
def test_a_person_is_asked(
    repo: Toy, approve: bool, registry: Registry, webhook: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def answer(wait_for_input: Any, timeout: int) -> Any:
        asked.append({"description": wait_for_input._description, "timeout": timeout})
        return scheduled.Approval(approve=approve, name="ann", reason="looked at it")

    monkeypatch.setattr(scheduled, "pause_flow_run", answer)
    assert pipeline(approval_hours=2, notification="custom-webhook/team", return_state=True).is_completed()
    assert asked[0]["timeout"] == 7200
    assert "policy/3 failed none of its gates" in asked[0]["description"]
    assert registry.decided == [("promote" if approve else "decline", "3", "ann", "looked at it")]
    told = "is the champion now" if approve else "stays a candidate: ann said no: looked at it"
    assert f"policy/3 {told}" in webhook[0]


def test_a_yes_that_comes_too_late_moves_nothing(
    repo: Toy, registry: Registry, webhook: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(wait_for_input: Any, timeout: int) -> Any:
        registry.champion = "4"  # meanwhile
        return scheduled.Approval(approve=True, name="ann", reason="looked at it")

    monkeypatch.setattr(scheduled, "pause_flow_run", answer)
    assert pipeline(notification="custom-webhook/team", return_state=True).is_completed()
    assert registry.decided == []
    assert "policy/4 became the champion meanwhile, and this one was not held against it" in webhook[0]


def test_nobody_answers(repo: Toy, registry: Registry, webhook: list[str]) -> None:
    state = pipeline(approval_hours=2 / 3600, notification="custom-webhook/team", return_state=True)
    assert state.is_completed(), state.message
    assert "policy/3 stays a candidate: nobody said yes" in webhook[0]
    assert [decision[:3] for decision in registry.decided] == [("decline", "3", "nobody")]


# ---- the store ----


@pytest.fixture
def s3(repo: Toy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The DVC remote is a bucket of a server at this address, which nobody serves yet."""
    address = f"http://127.0.0.1:{free_port()}"
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    shell(repo.root, "dvc", "remote", "add", "--quiet", "--default", "s3", "s3://dvc/toy")
    shell(repo.root, "dvc", "remote", "modify", "--quiet", "s3", "endpointurl", address)
    commit(repo.root)
    return address


def test_s3_refuses_and_then_takes_it(repo: Toy, s3: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        """An empty bucket that may be read and not written."""

        protocol_version = "HTTP/1.1"  # clients wait for `100 Continue` before they send a body

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_error(403, "Forbidden")

        do_POST = do_PUT

        def do_HEAD(self) -> None:
            self.send_error(404, "Not Found")

        def do_GET(self) -> None:
            empty = b"<ListBucketResult><Name>dvc</Name><KeyCount>0</KeyCount></ListBucketResult>"
            self.send_response(200)
            self.send_header("content-length", str(len(empty)))
            self.end_headers()
            self.wfile.write(empty)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", int(s3.rpartition(":")[2])), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = untouched(repo.root)
    state = pipeline.with_options(retries=0)(return_state=True)
    server.shutdown()
    server.server_close()
    assert state.is_failed()
    assert "`dvc push` failed" in state.message
    assert "orbidden" in state.message or "Access Denied" in state.message
    assert untouched(repo.root) == before
    (branch,) = shell(repo.root, "git", "branch", "--list", "--format=%(refname:short)", "runs/*").split()
    assert "last.txt" in shell(repo.root, "git", "show", f"{branch}:dvc.lock"), "what was done is on the branch"

    moto = ThreadedMotoServer("127.0.0.1", int(s3.rpartition(":")[2]), verbose=False)
    moto.start()
    try:
        client: Any = boto3.client("s3", endpoint_url=s3)
        client.create_bucket(Bucket="dvc")
        again = pipeline(revision=branch, return_state=True)
        assert again.is_completed(), again.message
        assert set(task_states(again).values()) == {"Cached"}
        stored = client.list_objects_v2(Bucket="dvc", Prefix="toy/files")["Contents"]
        assert len(stored) == 3
        damaged_bytes_are_refused(repo, client, str(again.result()["branch"]))
    finally:
        moto.stop()


def damaged_bytes_are_refused(repo: Toy, client: Any, branch: str) -> None:
    """The machine has lost its cache, a stage must run on what S3 holds, and one of its inputs is another there."""
    left = Path(md5_of(repo.root, branch, "left.txt"))
    client.put_object(Bucket="dvc", Key=f"toy/files/md5/{left}", Body=b"evil")
    shell(repo.root, "git", "switch", "--quiet", "-C", "changed", branch)
    text = (repo.root / "dvc.yaml").read_text()
    (repo.root / "dvc.yaml").write_text(
        text.replace("toy.py last left.txt right.txt", "toy.py last right.txt left.txt")
    )
    commit(repo.root)
    shutil.rmtree(repo.root / ".dvc/cache")
    state = pipeline.with_options(retries=0)(return_state=True)
    assert state.is_failed()
    assert "failed: last" in state.message
    newest = shell(repo.root, "git", "for-each-ref", "--sort=-committerdate", "--format=%(refname)", "refs/heads/runs")
    assert "evil" not in shell(repo.root, "git", "show", f"{newest.split()[0]}:dvc.lock")
    for file in (repo.root / ".rlhf").rglob("*.txt"):
        assert "evil" not in file.read_text()


def md5_of(root: Path, branch: str, out: str) -> str:
    """Where the object of an out lies, below files/md5."""
    lock = YAML(typ="safe").load(shell(root, "git", "show", f"{branch}:dvc.lock"))
    md5 = next(
        str(one["md5"]) for stage in lock["stages"].values() for one in stage.get("outs", []) if one["path"] == out
    )
    return f"{md5[:2]}/{md5[2:]}"


def test_the_disk_of_the_remote_is_full(repo: Toy) -> None:
    remote = repo.root.parent / "remote"
    before = untouched(repo.root)
    with small_disk(remote, "4k"):
        state = pipeline.with_options(retries=0)(return_state=True)
        assert state.is_failed()
        assert "No space left on device" in state.message
    assert untouched(repo.root) == before
    (branch,) = shell(repo.root, "git", "branch", "--list", "--format=%(refname:short)", "runs/*").split()
    again = pipeline(revision=branch, return_state=True)
    assert again.is_completed(), again.message
    assert set(task_states(again).values()) == {"Cached"}
    for out in ("left.txt", "right.txt", "last.txt"):
        assert (remote / "files/md5" / md5_of(repo.root, branch, out)).exists()


def test_a_sweep(repo: Toy) -> None:
    state = sweep({"toy.size": [1, 2], "toy.name": ["a"]}, return_state=True)
    assert state.is_completed(), state.message
    rows = state.result()
    assert [(row["toy.size"], row["toy.name"], row["result"]) for row in rows] == [
        (1, "a", "Completed"),
        (2, "a", "Completed"),
    ]
    shown = [shell(repo.root, "git", "show", f"{row['branch']}:params.yaml") for row in rows]
    assert "size: 1, name: a" in shown[0]
    assert "size: 2, name: a" in shown[1]


def test_points_of_a_sweep() -> None:
    grid: dict[str, list[Any]] = {"a": [1, 2], "b": ["x", "y", "z"]}
    every = points(grid, None, 1)
    assert every == [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y", "z")]
    some = points(grid, 4, 1)
    assert len(some) == 4
    assert all(point in every for point in some)
    assert [point for number, point in enumerate(some) if point in some[:number]] == []
    assert points(grid, 4, 1) == some != points(grid, 4, 2)
    assert len(points(grid, 99, 1)) == 6
    wrong: list[Any] = [{}, {"a": []}, {"a": 3}]
    for one in wrong:
        with pytest.raises(UserError, match="the grid must give values for each key"):
            points(one, None, 1)


def test_pruning(repo: Toy) -> None:
    pipeline(return_state=True)
    (repo.root / "fail-last.txt").write_text("mistake mistake mistake")
    (repo.root / "knob.txt").write_text("2")
    commit(repo.root)
    pipeline.with_options(retries=0)(return_state=True)
    assert len(list((repo.root / ".rlhf/workspaces").glob("*/"))) == 1
    state = prune(keep_days=0, keep_branches=1, return_state=True)
    assert state.message == "removed: 1 workspaces, 1 branches"
    assert not list((repo.root / ".rlhf/workspaces").glob("*/"))
    assert shell(repo.root, "git", "branch", "--list", "runs/*").count("runs/") == 1
