"""A toy repository whose stages are a few lines of Python that need no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prefect.client.base import PrefectHttpxSyncClient

from tasks.conversations import Conversation
from tasks.labels.judgments import DEMONSTRATIONS, WrittenDemonstration, item_id
from tasks.labels.label_file import append

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds; the machines that run the tests may be slow and busy

STAGES = """
import os, sys, time
from pathlib import Path

name, *reads = sys.argv[1:]
with open(f"log-{name}.txt", "a") as log:
    print("start", time.monotonic(), file=log)
Path(f"pid-{name}.txt").write_text(str(os.getpid()))
for wait in range(int(float(os.environ.get("TOY_SECONDS_" + name, "0")) * 10)):
    print(f"\\r{name} {wait}", end="", file=sys.stderr, flush=True)
    time.sleep(0.1)
failures = Path(f"fail-{name}.txt")
if failures.exists():
    kind, *more = failures.read_text().split()
    if more:
        failures.write_text(" ".join(more))
    else:
        failures.unlink()
    print("about to fail", flush=True)
    sys.exit("error: stage `%s`: the raw file is torn" % name if kind == "mistake" else "ValueError: no luck this time")
text = "".join(Path(path).read_text() for path in reads)
Path(f"{name}.txt").write_text(text + name)
Path(f"{name}.json").write_text('{"toy": {"length": %d}}' % len(text + name))
with open(f"log-{name}.txt", "a") as log:
    print("end", time.monotonic(), file=log)
"""

PEOPLE = """
import sys
from pathlib import Path

from tasks.datasets import read_rows
from tasks.labels.judgments import WrittenDemonstration, item_id
from tasks.labels.queue import Item, Queue, open_queue, require_labels
from tasks.stage import WaitsForPeopleError

prompts = [[{"role": "user", "content": text}] for text in Path("left.txt").read_text().split()]
items = [Item(item=item_id(prompt), prompt=prompt, responses=[], ended=[], labels=2) for prompt in prompts]
queue = Queue(job="demonstrate", seed=1, max_tokens=8, leave_out=[], set_aside_after=2, items=items)
open_queue(queue, Path())
written = read_rows(Path("data/labels/demonstrations.jsonl"), WrittenDemonstration, may_be_empty=True)
try:
    if "fill_in: true" not in Path("params.yaml").read_text():
        require_labels(queue, written)
except WaitsForPeopleError as error:
    print(f"waits: stage `demonstrate`: {error}", file=sys.stderr)
    sys.exit(3)
Path("demonstrate.txt").write_text(" ".join(f"{row.labeler}:{row.response}" for row in written))
"""


def stage_yaml(name: str, reads: str, meta: str) -> str:
    return f"""
  {name}:
    cmd: python toy.py {name} {reads}
    deps: [toy.py, {", ".join(["knob.txt", *reads.split()])}]
    outs: [{name}.txt]
    metrics: [{{{name}.json: {{cache: false}}}}]
    meta: {{figure: toy.length, retry_delay_seconds: 0, {meta}}}
"""


@dataclass
class Toy:
    """A repository of three stages: `left` and `right` read nothing of each other, `last` reads both."""

    root: Path
    environment: dict[str, str]
    flows: list[subprocess.Popen[str]] = field(default_factory=list)
    mark: str = field(default_factory=lambda: f"RLHF_TEST_{uuid.uuid4().hex}")

    def write(self, left: str = "retries: 0", right: str = "retries: 0", last: str = "retries: 0") -> None:
        stages = [("left", "", left), ("right", "", right), ("last", "left.txt right.txt", last)]
        (self.root / "dvc.yaml").write_text("stages:" + "".join(stage_yaml(*stage) for stage in stages))

    def ask_people(self) -> None:
        """One prompt that two people must answer, between two stages that need nobody."""
        (self.root / "people.py").write_text(PEOPLE)
        (self.root / "data/labels").mkdir(parents=True)
        (self.root / "data/labels/demonstrations.jsonl").touch()
        (self.root / "params.yaml").write_text("demonstrate:\n  human:\n    fill_in: false\n")
        demonstrate = """
  demonstrate:
    cmd: python people.py
    deps: [people.py, left.txt, data/labels/demonstrations.jsonl]
    params: [demonstrate]
    outs: [demonstrate.txt]
"""
        last = stage_yaml("last", "demonstrate.txt", "retries: 0")
        (self.root / "dvc.yaml").write_text(f"stages:{stage_yaml('left', '', 'retries: 0')}{demonstrate}{last}")

    def label(self, labeler: str) -> None:
        """As the page does it."""
        prompt: Conversation = [{"role": "user", "content": "left"}]
        row = WrittenDemonstration(
            item=item_id(prompt),
            prompt=prompt,
            labeler=labeler,
            guidelines="none",
            started_at="2026-01-01T00:00:00Z",
            ended_at="2026-01-01T00:01:00Z",
            skipped=None,
            response="gern",
        )
        append(row, self.root / DEMONSTRATIONS)

    def times(self, stage: str) -> list[tuple[str, float]]:
        lines = (self.root / f"log-{stage}.txt").read_text().splitlines()
        return [(word, float(when)) for word, when in (line.split() for line in lines)]

    def starts(self, stage: str) -> int:
        log = self.root / f"log-{stage}.txt"
        return log.read_text().count("start") if log.exists() else 0

    def popen(self, **environment: str) -> subprocess.Popen[str]:
        """The flow in a process of its own, as a person starts it."""
        flow = subprocess.Popen(
            [sys.executable, "-m", "flows.rlhf"],
            cwd=self.root,
            env=os.environ | self.environment | {self.mark: "1"} | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.flows.append(flow)
        return flow

    def end(self) -> None:
        """A failed test must not leave what it found."""
        for line in self.processes():
            psutil.Process(int(line.split()[0])).kill()
        for flow in self.flows:
            with flow:
                pass

    def processes(self) -> list[str]:
        """All that this toy started and that still lives, whatever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if self.mark in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
            except psutil.Error:
                continue
        return found


def ask(api: str, path: str, wanted: object = None) -> Any:
    """What Prefect's server answers. A busy one (503, SQLite is locked) is asked again, as by Prefect itself."""
    with PrefectHttpxSyncClient(base_url=api) as client:
        return (client.get(path) if wanted is None else client.post(path, json=wanted)).json()


def wait_until(holds: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.1)
    return holds()


def a_verdict(**more: Any) -> dict[str, Any]:
    """As `register` writes it into registered.json, of a policy that missed one gate."""
    facts = [{"name": "PPO kept", "text": "update 6 of 8"}, {"name": "Champion now", "text": "none"}]
    return {
        **{"headline": "policy/2 is refused", "facts": facts, "next": []},
        **{"policy": "policy/2", "outcome": "refused: kl", "champion": "", "rival": "", "nothing_gained": False},
        **{"kept_update": 6, "updates": 8, "gates_failed": ["kl"], "gates_open": []},
        **more,
    }
