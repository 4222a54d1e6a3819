"""The server stack without Docker: the real stages on a tiny model, as a scheduled deployment, on PostgreSQL and S3."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from ruamel.yaml import YAML

from flows.server import free_port
from flows.stack import postgres_tools
from tasks.lineage import load_stages
from tasks.stage import UserError
from tests.flows.toy import ask, wait_until
from tests.pipeline.test_end_to_end import lock_of
from tests.tiny import shell

ROOT = Path(__file__).parents[2]
SECRET = "planted-secret-8f3a1c"
yaml = YAML()


class Stack:
    """`python -m flows.stack local` in a repository, and the settings that it printed."""

    def __init__(self, process: subprocess.Popen[str], settings: dict[str, str], folder: Path) -> None:
        self.process, self.settings, self.folder = process, settings, folder

    def post(self, path: str, **wanted: Any) -> Any:
        return ask(self.settings["PREFECT_API_URL"], path, wanted)


@pytest.fixture(scope="module")
def postgresql() -> None:
    """Installed where this is root's machine; who is not root may be without it."""
    try:
        postgres_tools()
    except UserError as lacking:
        pytest.skip(str(lacking))


@pytest.fixture(scope="module")
def repo(postgresql: None, make_repo: Any) -> Path:
    """The tiny repository with a commit and the DVC remote on S3; its nightly run is due in half a minute, once."""
    folder: Path = make_repo("stack")
    for name in ("prefect.yaml", "Makefile"):
        shutil.copy(ROOT / name, folder)
    shell(folder, "git", "config", "user.name", "Test")
    shell(folder, "git", "config", "user.email", "test@example.com")
    shell(folder, "dvc", "remote", "add", "--quiet", "--default", "store", "s3://dvc/rlhf")
    deployments = yaml.load(folder / "prefect.yaml")
    nightly = next(one for one in deployments["deployments"] if one["name"] == "nightly")
    due = datetime.now(UTC) + timedelta(seconds=90)
    nightly["schedules"] = [{"interval": 86400, "anchor_date": due.isoformat(), "timezone": "UTC"}]
    yaml.dump(deployments, folder / "prefect.yaml")
    shell(folder, "git", "add", ".")
    shell(folder, "git", "commit", "--quiet", "-m", "Start")
    return folder


@pytest.fixture(scope="module")
def stack(repo: Path) -> Iterator[Stack]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RLHF_", "MLFLOW_"))
    }
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(repo / ".prefect"),
        "PYTHONUNBUFFERED": "1",
        "PLANTED_TOKEN": SECRET,
    }
    log = repo.parent / "stack.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.stack", "local", "--watch-seconds=5"],
            cwd=repo,
            env=environment,
            text=True,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 300
        while not (found := re.search(r"In another shell: \. (\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        file = Path(found[1])
        lines = [line.removeprefix("export ").split("=", 1) for line in file.read_text().splitlines()]
        yield Stack(process, dict(lines), file.parent)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def flow_run(stack: Stack) -> dict[str, Any]:
    """The scheduled run, once it has ended."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        runs = stack.post("flow_runs/filter", flows={"name": {"any_": ["pipeline"]}}, sort="EXPECTED_START_TIME_ASC")
        ended = [run for run in runs if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")]
        if ended:
            run: dict[str, Any] = ended[0]
            assert run["state_type"] == "COMPLETED", (run["state"], (stack.folder / "worker.log").read_text()[-5000:])
            assert run["auto_scheduled"]
            return run
        time.sleep(2)
    raise AssertionError((stack.folder / "worker.log").read_text()[-5000:])


def test_the_scheduled_run_gives_the_same_bits_as_dvc(
    repo: Path, flow_run: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    branch = f"runs/{flow_run['id']}"
    lock = YAML(typ="safe").load(shell(repo, "git", "show", f"{branch}:dvc.lock"))
    by_dvc: Path = request.getfixturevalue("by_dvc")  # only now, when another worker has made it
    assert lock == lock_of(by_dvc.parent)
    reports = shell(repo, "git", "ls-tree", "-r", "--name-only", branch, "--", "data").split()
    assert "data/reports/evaluation/metrics.json" in reports
    assert shell(repo, "git", "status", "--porcelain") == ""
    assert not (repo / "data/models").exists()
    assert not list((repo / ".rlhf/workspaces").glob("*/"))


def test_it_loads_from_the_registry_and_s3_alone(
    repo: Path, stack: Stack, flow_run: dict[str, Any], tmp_path: Path
) -> None:
    hidden = repo / ".dvc/hidden"
    (repo / ".dvc/cache").rename(hidden)
    code = (
        "import json, mlflow\n"
        "policy = mlflow.pyfunc.load_model('models:/policy@candidate')\n"
        "print(json.dumps(policy.predict(['Customer: Ann'])))\n"
    )

    def load() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **stack.settings},
            capture_output=True,
            text=True,
            check=False,
        )

    try:
        done = load()
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout.splitlines()[-1])) == 1
        assert len(served(stack, tmp_path)) == 1
        damage(stack)
        done = load()
        assert "is damaged: s3://dvc/rlhf" in done.stderr
    finally:
        hidden.rename(repo / ".dvc/cache")


def served(stack: Stack, folder: Path) -> list[str]:
    """What `mlflow models serve` answers, started where only the two addresses are known."""
    port = free_port()
    log = folder / "serve.log"
    command = ["mlflow", "models", "serve", "--model-uri=models:/policy@candidate", "--env-manager=local"]
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        **stack.settings,
    }
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", *command, f"--port={port}"],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        ) as server,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            assert wait_until(lambda: answers(f"{address}/ping"), 120), log.read_text()
            answer = httpx.post(f"{address}/invocations", json={"inputs": ["Customer: Ann"]}, timeout=60)
            assert answer.status_code == 200, answer.text
            texts: list[str] = answer.json()["predictions"]
            return texts
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


def damage(stack: Stack) -> None:
    """One bit of every object on S3 that holds weights."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=stack.settings["AWS_ENDPOINT_URL"],
        aws_access_key_id=stack.settings["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=stack.settings["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    for entry in client.list_objects_v2(Bucket="dvc", Prefix="rlhf/files")["Contents"]:
        if entry["Size"] > 50_000:
            content = client.get_object(Bucket="dvc", Key=entry["Key"])["Body"].read()
            client.put_object(Bucket="dvc", Key=entry["Key"], Body=content[:-1] + bytes([content[-1] ^ 1]))


def test_prefect_shows_it_and_links_to_mlflow_and_back(stack: Stack, flow_run: dict[str, Any], repo: Path) -> None:
    from mlflow import MlflowClient

    artifacts = stack.post("artifacts/filter", limit=200)
    keys = {one["key"] for one in artifacts}
    assert {"rlhf-stages", "rlhf-evaluation", "rlhf-mlflow", "rlhf-ppo"} <= keys
    link = next(one["data"] for one in artifacts if one["key"] == "rlhf-mlflow")
    assert stack.settings["MLFLOW_TRACKING_URI"] in link
    client = MlflowClient(stack.settings["MLFLOW_TRACKING_URI"], stack.settings["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("rlhf")
    runs = client.search_runs([experiment.experiment_id])
    stages = {run.data.tags.get("dvc.stage") for run in runs} - {None}
    assert stages == set(load_stages(repo))
    wrong = [run.data.tags for run in runs if "/runs/flow-run/" not in run.data.tags.get("prefect.url", "")]
    assert wrong == []
    assert not [run for run in runs if run.info.status != "FINISHED"]


def test_new_labels_start_a_run_and_nothing_else_does(stack: Stack, flow_run: dict[str, Any], repo: Path) -> None:
    """In the run, on another workspace, everything is Cached: DVC's run cache and S3 have it."""

    def runs() -> list[dict[str, Any]]:
        found = stack.post("flow_runs/filter", deployments={"name": {"any_": ["on-new-labels"]}})
        return [run for run in found if run["state_type"] != "SCHEDULED" or not run["auto_scheduled"]]

    shell(repo, "git", "merge", "--quiet", "--ff-only", f"runs/{flow_run['id']}")
    (repo / "data/labels").mkdir(parents=True, exist_ok=True)
    (repo / "data/labels/ann.jsonl").write_text("{}\n")
    shell(repo, "git", "add", "data/labels")
    shell(repo, "git", "commit", "--quiet", "-m", "Labels")
    assert runs() == []
    assert wait_until(lambda: any(run["state_type"] in ("COMPLETED", "FAILED", "CRASHED") for run in runs()), 300)
    (run,) = runs()
    assert run["state_type"] == "COMPLETED", (stack.folder / "worker.log").read_text()[-5000:]
    assert run["parameters"]["revision"] == shell(repo, "git", "rev-parse", "HEAD").strip()
    lock = shell(repo, "git", "show", f"runs/{run['id']}:dvc.lock")
    assert lock == shell(repo, "git", "show", f"runs/{flow_run['id']}:dvc.lock"), "nothing ran again"


def test_no_secret_is_anywhere(stack: Stack, flow_run: dict[str, Any], repo: Path) -> None:
    """Not the planted one, and none of the stack's: in files, in git, in Prefect's and MLflow's answers."""
    children = psutil.Process(stack.process.pid).children(recursive=True)
    databases = {child.environ().get("MLFLOW_BACKEND_STORE_URI") for child in children} - {None}
    passwords = {str(urlsplit(database).password) for database in databases}
    assert len(passwords) == 1
    secrets = [SECRET, stack.settings["AWS_SECRET_ACCESS_KEY"], *passwords]
    texts: dict[str, str] = {}
    for folder in (repo, stack.folder):
        for file in folder.rglob("*"):
            if file.is_file() and file.name != "env" and "postgres/data" not in str(file):
                texts[str(file)] = file.read_bytes().decode(errors="replace")
    for what in ("artifacts", "flow_runs", "task_runs", "deployments", "logs", "variables", "work_pools"):
        texts[what] = json.dumps(stack.post(f"{what}/filter", limit=200))
    dump = subprocess.run(
        [sys.executable, "-c", DUMP], env=os.environ | stack.settings, capture_output=True, text=True, check=True
    )
    texts["mlflow"] = dump.stdout
    assert "dvc.stage" in texts["mlflow"]
    found = [place for place, text in texts.items() if any(secret in text for secret in secrets)]
    assert found == []


DUMP = """
from mlflow import MlflowClient
client = MlflowClient()
for run in client.search_runs([e.experiment_id for e in client.search_experiments()]):
    print(run.to_dictionary())
for version in client.search_model_versions():
    print(dict(version))
"""
