"""The whole pipeline with people in the loop: suspended, labelled through the page's own interface, to the policy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ruamel.yaml import YAML

from flows.server import free_port
from tasks.labels.queue import LABELS, Job
from tests.flows.toy import ask, wait_until
from tests.tiny import shell

yaml = YAML()
LABELERS = ("ann", "bo", "cem")


@dataclass
class Place:
    """The tiny repository with `labeler: human` for both jobs, and what is started in it."""

    root: Path
    ports: dict[str, int]

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.ports['prefect']}/api"

    @property
    def page(self) -> str:
        return f"http://127.0.0.1:{self.ports['page']}"

    @contextmanager
    def started(self, log: str, *command: str) -> Iterator[Path]:
        """A command of the Makefile, in a process of its own; ended by SIGKILL, and all that it started with it."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RLHF_", "MLFLOW_"))
        }
        environment |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(self.root / ".prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "RLHF_LABEL_URL": self.page,
        }
        file = self.root.parent / log
        with (
            file.open("w") as output,
            subprocess.Popen(
                [sys.executable, "-m", *command], cwd=self.root, env=environment, stdout=output, stderr=output
            ) as process,
        ):
            children: list[psutil.Process] = []
            try:
                yield file
            finally:
                if process.poll() is None:
                    children = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                process.wait()
        psutil.wait_procs(children, timeout=30)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]

    @contextmanager
    def serving(self, log: str) -> Iterator[None]:
        """`make serve`."""
        ports = [f"--{name}-port={self.ports[name]}" for name in ("mlflow", "prefect")]
        with self.started(log, "flows.serve", *ports, "--watch-seconds=2") as file:
            assert wait_until(lambda: "Ctrl-C stops all of it" in file.read_text(), 180), file.read_text()
            yield

    @contextmanager
    def labelling(self, log: str) -> Iterator[None]:
        """`make label`."""
        with self.started(log, "tasks.labels.page", f"--port={self.ports['page']}") as file:
            assert wait_until(lambda: "http://" in file.read_text(), 120), file.read_text()
            yield

    def state(self, run: str) -> dict[str, Any]:
        state: dict[str, Any] = ask(self.api, f"flow_runs/{run}")["state"]
        return state

    def until(self, run: str, name: str) -> None:
        """`name`: of a state."""
        ended = ("Completed", "Failed", "Crashed", "Cancelled")
        assert wait_until(lambda: self.state(run)["name"] in (name, *ended), 600), self.said()
        assert self.state(run)["name"] == name, (self.state(run), self.said())

    def said(self) -> str:
        return "\n".join(log.read_text()[-4000:] for log in self.root.parent.rglob("*.log"))


@pytest.fixture
def place(make_repo: Any) -> Place:
    root: Path = make_repo("people")
    shutil.copy(Path(__file__).parents[2] / "prefect.yaml", root)
    params = yaml.load(root / "params.yaml")
    params["demonstrate"]["labeler"] = params["rank"]["labeler"] = "human"
    params["rank"]["human"].update(shared_share=0.6, shared_labels=2)
    yaml.dump(params, root / "params.yaml")
    shell(root, "git", "config", "user.name", "Test")
    shell(root, "git", "config", "user.email", "test@example.com")
    shell(root, "dvc", "remote", "add", "--quiet", "--force", "--default", "local", str(root.parent / "remote"))
    shell(root, "git", "add", ".")
    shell(root, "git", "commit", "--quiet", "-m", "Start")
    return Place(root, {name: free_port() for name in ("mlflow", "prefect", "page")})


def label_all(place: Place, job: Job, labelers: Sequence[str] = LABELERS) -> int:
    """What people do in their browsers, over the same interface: each takes what is handed out until nothing is."""
    token = (place.root / ".rlhf/label_token_loopback").read_text().strip()
    count = 0
    for labeler in labelers:
        with httpx.Client(base_url=f"{place.page}/api", timeout=60) as browser:

            def post(what: str, browser: httpx.Client = browser, **body: Any) -> dict[str, Any]:
                answer = browser.post(f"/{what}", json=body)
                assert answer.is_success, answer.text
                told: dict[str, Any] = answer.json()
                return told

            post("sign-in", name=labeler, token=token)
            while (item := post("next", job=job))["item"]:
                visit = {"job": job, **{key: item[key] for key in ("item", "started_at", "guidelines")}}
                if job == "demonstrate":
                    post("save", **visit, response=f"Dear customer, we are sorry. Yours, {labeler}")
                else:
                    lengths = [len(output["text"]) for output in item["outputs"]]
                    ranks = [1 + sum(other < length for other in lengths) for length in lengths]
                    flags: list[list[str]] = [[] if output["ended"] else ["broken"] for output in item["outputs"]]
                    post("save", **visit, ranks=ranks, flags=flags, ratings=[4] * len(ranks))
                count += 1
    return count


def missing(place: Place, run: str) -> str:
    """What the run's page says."""
    wanted = {"artifacts": {"key": {"any_": ["rlhf-labels"]}, "flow_run_id": {"any_": [run]}}}
    found = sorted(ask(place.api, "artifacts/filter", wanted), key=lambda one: str(one["created"]))
    return str(found[-1]["data"])


def test_from_a_suspended_run_to_a_registered_policy_made_of_people_s_labels(place: Place) -> None:
    root = place.root
    with place.serving("first.log"):
        deployment = ask(place.api, "deployments/name/pipeline/nightly")["id"]
        run = str(ask(place.api, f"deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"])
        place.until(run, "Suspended")
        assert f"**Labels by people that are missing: 12.** [Open the page]({place.page})" in missing(place, run)
    # whatever had started it is gone; people label, and then it is all started again
    with place.labelling("page.log"):
        assert label_all(place, "demonstrate") == 12
        with place.serving("second.log"):
            assert wait_until(lambda: "| rank |" in missing(place, run), 600), place.said()
            place.until(run, "Suspended")
            wanted = int(missing(place, run).partition("missing: ")[2].partition(".")[0])
            assert wanted > 10, "some outputs are ranked by two"
            assert label_all(place, "rank") == wanted
            place.until(run, "Completed")
            made_of(place, run)
            assert ask(place.api, f"flow_runs/{run}")["run_count"] == 1

        # the labels and the run's branch are merged; later somebody ranks again
        shell(root, "git", "commit", "--quiet", "-am", "Labels")
        shell(root, "git", "merge", "--quiet", "--no-edit", f"runs/{run}")
        shell(root, "dvc", "pull", "--quiet")
        assert shell(root, "dvc", "status", "--json") == "{}\n"
        rankings = root / LABELS["rank"][0]
        last = rankings.read_text().splitlines()[-1]
        rankings.write_text(rankings.read_text() + last.replace('"labeler": "', '"labeler": "new-') + "\n")
        changed = yaml.load(shell(root, "dvc", "status", "--json"))
        assert set(changed) == {"rank"}


def made_of(place: Place, run: str) -> None:
    """The registered policy's lineage names the files of labels by their hashes, and whose they are."""
    done = subprocess.run(
        [sys.executable, "-m", "tasks.lineage", "models:/policy@candidate", "--json"],
        cwd=place.root,
        env=os.environ | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{place.ports['mlflow']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    lock = YAML(typ="safe").load(shell(place.root, "git", "show", f"runs/{run}:dvc.lock"))
    assert {one["kind"] for one in found["labels"]} == {"human"}
    for job, (file, row_type) in LABELS.items():
        text = shell(place.root, "git", "show", f"runs/{run}:{file}")
        assert text == (place.root / file).read_text(), "what people have said, to the last line"
        rows = [row_type.model_validate_json(line) for line in text.splitlines()]
        used = {one["labeler"]: one["used"] for one in found["labels"] if one["job"] == job}
        assert used == Counter(row.labeler for row in rows)
        locked = {dep["path"]: dep["md5"] for dep in lock["stages"][job]["deps"]}
        assert {"path": str(file), "md5": locked[str(file)]}.items() <= next(
            one for one in found["files"] if one["path"] == str(file)
        ).items()
