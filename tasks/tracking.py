"""The record of every run, in MLflow: what a stage logs goes to a journal on disk first, then to the server.

A stage never waits for MLflow and never fails because of it. What it logs is appended to `.rlhf/journal/<id>/`, one
JSON line an event with its own time stamp; a background thread mirrors the lines to the server, or with
RLHF_SENDS=flow the flow sends them when the stages have ended. What the server missed stays in the journal, and

    python -m tasks.tracking replay

sends it. Sending is idempotent: a run is found by the journal's id before it is made, and everything that is logged to
it overwrites itself, so a line that is sent twice is there once.

This is the only module that logs to MLflow. It goes to MLFLOW_TRACKING_URI, or else to `mlflow.db` in the repository.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import shutil
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.datasets import flat, rounded
from tasks.lineage import StageSpec, environment, git_state, hash_path, run_name
from tasks.stage import UserError, WaitsForPeopleError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tasks.params import Params

EXPERIMENT = "rlhf"
QUICK_EXPERIMENT = "rlhf-quick"  # of quick runs: RLHF_EXPERIMENT says so to the stages (flows/quick.py)
NOTE = "mlflow.note.content"
VIEW = "rlhf"  # the name of a saved view in addresses
STATE = Path(".rlhf")  # git-ignored, outside every out
JOURNALS = STATE / "journal"
FLUSH_SECONDS = 3.0
SAMPLE_SECONDS = 10.0
LAST_CHANCE_SECONDS = 20.0  # what the end of a stage waits for the server, at most
KILLED_SECONDS = 1.0  # the same when the stage is being stopped
OWN = ("time/", "system/")  # metrics of one process, which say nothing of its pipeline
SHARED = ("gates", "policy")  # tags of a stage that its pipeline has too: columns of the list of runs
GIVE_UP_SECONDS = 60.0  # after a failure the flow does not ask again for so long

Event = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# What stages use


class Tracker:
    """Takes what a stage logs. Each call appends one event and returns at once."""

    def __init__(self, record: Callable[[Event], None], journal: Journal | None = None, mirror: Mirror | None = None):
        self._record = record
        self._journal = journal
        self._mirror = mirror

    @classmethod
    def in_memory(cls, events: list[Event]) -> Tracker:
        """For tests: the events are appended to the list and go nowhere else."""
        return cls(events.append)

    @classmethod
    @contextmanager
    def for_stage(cls, spec: StageSpec, params: Params) -> Iterator[Tracker]:
        """The tracker of one stage run, from its start to its end, whichever way it ends."""
        journal = Journal.create(spec.name)
        started = time.monotonic()
        mirror = None if os.environ.get("RLHF_SENDS") == "flow" else Mirror(journal)
        watcher = _Watcher(journal.append, spec)
        journal.append(_start_event(journal.id, spec, params))
        if mirror:
            mirror.start()
        watcher.start()
        status = "FAILED"
        try:
            yield cls(journal.append, journal, mirror)
            status = "FINISHED"
        except WaitsForPeopleError:
            status = "SCHEDULED"  # MLflow's only word for a run that is neither at its end nor at fault
            raise
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            watcher.stop()
            journal.append({"kind": "metrics", "values": {"time/seconds": time.monotonic() - started}, "step": 0})
            journal.append({"kind": "end", "status": status})
            if mirror:
                mirror.finish(KILLED_SECONDS if status == "KILLED" else LAST_CHANCE_SECONDS)
            else:
                journal.lock.release()

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        """Figures, rounded as people read them, or one point of each curve when `step` says where it stands."""
        points = {key: float(value if step is not None else rounded(value)) for key, value in values.items()}
        self._record({"kind": "metrics", "values": points, "step": step or 0})

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Rows to look at, such as samples side by side. The same name again replaces the table."""
        self._record({"kind": "table", "name": name, "rows": rows})

    def artifact(self, path: Path) -> None:
        """A small file or folder, as it is now."""
        if self._journal:
            self._journal.keep(path)
        self._record({"kind": "artifact", "name": path.name})

    def tags(self, tags: dict[str, str]) -> None:
        """Facts in words about the run."""
        self._record({"kind": "tags", "tags": tags})

    def datasets(self, digests: Mapping[str, str]) -> None:
        """Data that the run has read, by name; those that dvc.yaml declares are there without it."""
        self._record({"kind": "datasets", "datasets": dict(digests)})

    def note(self, text: str) -> None:
        """Markdown that MLflow shows on top of the run's page, and of its pipeline's. The last one stays."""
        self._record({"kind": "note", "text": text})

    def outs(self, paths: dict[str, Path]) -> None:
        """The DVC hashes of what the stage wrote: by them a later pipeline finds this run."""
        self.tags({f"dvc.out.{out}": hash_path(path) for out, path in paths.items()})

    def run_id(self, timeout: float = 60.0) -> str:
        """The MLflow run of this stage, once it is there. For `register`, which cannot do its work without MLflow."""
        if self._mirror is None:
            raise UserError("there is no MLflow run: this stage does not send its record itself.")
        return self._mirror.wait_for_run(timeout)


def tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def connect() -> MlflowClient:
    """A client that gives up soon: by default MLflow's own retries for 247 s."""
    # A request that timed out may have been served: MLflow's blind retry would make a second run. We try again
    # ourselves, and look first whether it is there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    warnings.filterwarnings("ignore", module="alembic")  # about MLflow's own migrations
    import mlflow

    uri = tracking_uri()
    if uri.startswith("sqlite") and "?" not in uri:
        uri += "?timeout=30"  # by default SQLite waits 5 s for another process that writes
    with _machine_lock():  # the first one to come makes SQLite's tables
        return mlflow.MlflowClient(uri, uri)


def account() -> str:
    """The name of whoever runs this; a number where the system has no name for it, as in many a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def masked(text: str) -> str:
    """The text without passwords in its addresses."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


@contextmanager
def mlflow_told() -> Iterator[None]:
    """What MLflow, or the way to it, refuses becomes one line: a UserError that names the address."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise UserError(f"MLflow at {masked(tracking_uri())}: {masked(str(error)).splitlines()[0]}") from error


# ---------------------------------------------------------------------------------------------------------------------
# What the flow uses. None of these raises; where MLflow cannot be reached they return "" and say so once.


def open_pipeline(pipeline_id: str, tags: dict[str, str]) -> str:
    """Make the pipeline's run, or find it, and set it running; gives its address."""

    def work(client: MlflowClient) -> str:
        experiment = _experiment(client)
        run_id = _pipeline_run(client, experiment, pipeline_id, time.time())
        for key, value in tags.items():
            client.set_tag(run_id, key, masked(value))
        client.update_run(run_id, status="RUNNING")
        return run_url(experiment, run_id)

    return _attempt(work)


def link_cached(pipeline_id: str, spec: StageSpec, outs: dict[str, str]) -> str:
    """Put on the pipeline's run what the stage run logged that made these outs, {path: hash}, as if it had run in this
    pipeline, and a tag that names it; gives that run's address or ""."""

    def work(client: MlflowClient) -> str:
        tags = {"dvc.stage": spec.name, **{f"dvc.out.{path}": md5 for path, md5 in outs.items()}}
        found = [(place, run) for place in experiments(client) for run in _runs(client, place, tags)]
        if not found:
            return ""
        place, run = found[0]
        pipeline = _pipeline_run(client, _experiment(client), pipeline_id, time.time())
        client.set_tag(pipeline, f"cached.{spec.name}", run)
        _log_again(client, run, pipeline)
        return run_url(place, run)

    return _attempt(work) if outs else ""


def stage_run_url(pipeline_id: str, stage: str) -> str:
    """The address of the stage's run in this pipeline, or "". What stages have not sent themselves is sent first."""

    def work(client: MlflowClient) -> str:
        for journal in Journal.left(pipeline_id):
            _send_left(client, journal)
        experiment = _experiment(client)
        runs = _runs(client, experiment, {"pipeline.id": pipeline_id, "dvc.stage": stage})
        return run_url(experiment, runs[0]) if runs else ""

    return _attempt(work)


def close_pipeline(pipeline_id: str, status: str, note: str = "") -> None:
    """End the pipeline's run: FINISHED, FAILED, KILLED, or SCHEDULED where it waits for people. Stages that were killed
    outright are put on record first. A note takes the place of the one that a stage left."""

    def work(client: MlflowClient) -> str:
        for journal in Journal.left(pipeline_id):
            _send_left(client, journal)
        run_id = _pipeline_run(client, _experiment(client), pipeline_id, time.time())
        if note:
            client.set_tag(run_id, NOTE, note)
        client.set_terminated(run_id, status)
        return run_id

    _attempt(work)


def run_url(experiment: str, run_id: str) -> str:
    """Where to look at a run: on the server, or on SQLite in the UI that `make ui` starts."""
    uri = tracking_uri()
    server = re.sub(r"//[^/@]+@", "//", uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{experiment}/runs/{run_id}"


def runs_url(run: str) -> str:
    """The list of all runs, with its main columns, from the address of one."""
    return f"{run.rpartition('/')[0]}?viewStateShareKey={VIEW}"


_failed_at: dict[str, float] = {}  # tracking URI -> when it last failed, so that a flow does not wait again and again


def _attempt(work: Callable[[MlflowClient], str]) -> str:
    uri = tracking_uri()
    if time.monotonic() - _failed_at.get(uri, -GIVE_UP_SECONDS) < GIVE_UP_SECONDS:
        return ""
    try:
        return work(connect())
    except Exception as error:
        if uri not in _failed_at:
            print(f"warning: {_unreachable(error)}; the pipeline goes on without its links.", file=sys.stderr)
        _failed_at[uri] = time.monotonic()
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# The journal


class Journal:
    """The events of one stage run, on disk. Its lock is held by whoever writes or sends it."""

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock

        self.folder = folder.resolve()
        self.id = folder.name
        self.lock = FileLock(self.folder / "lock", thread_local=False)
        self._events = self.folder / "events.jsonl"
        self._writing = threading.Lock()
        self._warned = False

    @classmethod
    def create(cls, stage: str) -> Journal:
        folder = JOURNALS / f"{datetime.now():%Y%m%d-%H%M%S}-{stage}-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        journal = cls(folder)
        journal.lock.acquire()
        return journal

    @classmethod
    def left(cls, pipeline_id: str | None = None) -> list[Journal]:
        """Journals whose stage is over, oldest first; of one pipeline or of all."""
        journals = [cls(path) for path in sorted(JOURNALS.glob("*")) if path.is_dir()]
        return [journal for journal in journals if journal._is_left(pipeline_id)]

    def _is_left(self, pipeline_id: str | None) -> bool:
        from filelock import Timeout

        try:
            with self.lock.acquire(timeout=0):
                events = self.events()
        except (Timeout, OSError):
            return False  # its stage is still running, or somebody else is sending it
        return pipeline_id is None or (bool(events) and events[0]["tags"]["pipeline.id"] == pipeline_id)

    def append(self, event: Event) -> None:
        """Write one event, with the time. A full disk costs the record, not the training."""
        line = json.dumps({"time": int(time.time() * 1000), **event}, ensure_ascii=False, default=str) + "\n"
        try:
            with self._writing, self._events.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            if not self._warned:
                print(f"warning: {self._events}: {error.strerror}; what follows is not recorded.", file=sys.stderr)
            self._warned = True

    def keep(self, path: Path) -> None:
        """Copy an artifact into the journal, for it may change before it is sent."""
        target = self.folder / "artifacts" / path.name
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)

    def events(self, start: int = 0) -> list[Event]:
        """The complete lines from number `start` on. A stage that was killed may have left a torn last line."""
        if not self._events.exists():
            return []
        lines = self._events.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines[start:] if line.endswith("\n")]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _start_event(journal_id: str, spec: StageSpec, params: Params) -> Event:
    """Everything that is known when a stage starts."""
    commit, dirty = git_state()
    pipeline_id, pipeline_time, flow = _pipeline()
    tags = {
        "rlhf.journal": journal_id,
        "pipeline.id": pipeline_id,
        "dvc.stage": spec.name,
        "git.commit": commit,
        "git.dirty": str(dirty).lower(),
        **{f"env.{key}": value for key, value in environment().items()},
        "mlflow.source.name": spec.cmd,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
        "mlflow.user": account(),
    }
    for tag, variable in {
        "prefect.flow_run_id": "RLHF_FLOW_RUN_ID",
        "prefect.task_run_id": "RLHF_TASK_RUN_ID",
        "prefect.url": "RLHF_FLOW_RUN_URL",
    }.items():
        if os.environ.get(variable):
            tags[tag] = os.environ[variable]
    return {
        "kind": "start",
        "stage": spec.name,
        "tags": tags,
        "params": {key: masked(value) for key, value in flat_params(params, spec.params).items()},
        "pipeline_time": pipeline_time,
        "pipeline_name": run_name(),
        "flow": flow,
    }


def flat_params(params: Params, keys: tuple[str, ...]) -> dict[str, str]:
    """Only what is declared, with dotted names: {"ppo.kl_coef": "0.02"}."""
    return {key: str(value) for key, value in flat(params.declared(keys)).items()}


def _pipeline() -> tuple[str, float, bool]:
    """(id of the pipeline, when it started, whether a flow looks after its run).

    The flow says which it is. Under a bare `dvc repro` the stages of one dvc process share a pipeline, named by that
    process. A stage that runs alone is a pipeline of its own.
    """
    import psutil

    if pipeline_id := os.environ.get("RLHF_PIPELINE_ID"):
        return pipeline_id, time.time(), True
    for parent in psutil.Process().parents():
        try:
            command, pid, started = parent.cmdline(), parent.pid, parent.create_time()
        except psutil.Error:
            continue
        if any(Path(word).name == "dvc" for word in command[:3]):
            return uuid.uuid5(uuid.NAMESPACE_OID, f"{uuid.getnode()} {pid} {started}").hex[:16], started, False
    return uuid.uuid4().hex[:16], time.time(), False


# ---------------------------------------------------------------------------------------------------------------------
# Background threads: one watches the machine, one mirrors the journal


class _Watcher(threading.Thread):
    """Hashes the stage's inputs once, then samples the machine every few seconds."""

    def __init__(self, record: Callable[[Event], None], spec: StageSpec) -> None:
        super().__init__(name="watcher", daemon=True)
        self._record = record
        self._spec = spec
        self._over = threading.Event()

    def run(self) -> None:
        import psutil

        psutil.cpu_percent()  # counts from here to the first sample
        try:
            self._hash_inputs()
            while not self._over.wait(SAMPLE_SECONDS):
                self._sample()
            self._sample()
        except Exception as error:  # a record that is not complete is better than a stage that fails
            print(f"warning: system metrics end here: {error}", file=sys.stderr)

    def stop(self) -> None:
        self._over.set()
        self.join(LAST_CHANCE_SECONDS)

    def _hash_inputs(self) -> None:
        hashes = {dep: hash_path(Path(dep)) for dep in self._spec.data_deps if Path(dep).exists()}
        self._record({"kind": "tags", "tags": {f"dvc.dep.{dep}": md5 for dep, md5 in hashes.items()}})
        data = {dep: md5 for dep, md5 in hashes.items() if not dep.startswith("data/models/")}
        self._record({"kind": "datasets", "datasets": data})

    def _sample(self) -> None:
        self._record({"kind": "metrics", "values": _system_metrics(), "step": 0})


def _system_metrics() -> dict[str, float]:
    """MLflow's own names where it has them, so that its page of system metrics shows them."""
    import resource

    import psutil

    memory = psutil.virtual_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    values = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
        "system/process_peak_memory_megabytes": peak / 1e6,
    }
    return {**values, **_gpu_metrics()}


def _gpu_metrics() -> dict[str, float]:
    torch = sys.modules.get("torch")  # a stage that did not import it uses no GPU
    if torch is None or not getattr(torch, "cuda", None) or not torch.cuda.is_initialized():
        return {}
    values: dict[str, float] = {}
    for gpu in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(gpu)
        values[f"system/gpu_{gpu}_memory_usage_megabytes"] = (total - free) / 1e6
        values[f"system/gpu_{gpu}_memory_usage_percentage"] = 100 * (total - free) / total
    return values


class Mirror(threading.Thread):
    """Sends a journal's lines to MLflow as they come. It never raises; the stage waits for it only at the end."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(name="mirror", daemon=True)
        self._journal = journal
        self._sender: Sender | None = None
        self._closing = threading.Event()
        self._has_run = threading.Event()
        self._failure: Exception | None = None
        self._warned = False

    def run(self) -> None:
        failures = 0
        while True:
            closing = self._closing.is_set()
            try:
                self._sender = self._sender or Sender(connect(), self._journal)
                self._sender.send_new()
                self._has_run.set()
                failures = 0
                if self._sender.done:
                    self._journal.remove()
                    return
            except Exception as error:
                self._failure = error
                failures += 1
                if failures == 2:
                    self._warn("MLflow will be tried again.")
                if closing and failures >= 2 and "database is locked" not in str(error):
                    return
            self._closing.wait(FLUSH_SECONDS) if not closing else time.sleep(0.2)

    def wait_for_run(self, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while not self._has_run.wait(0.1):
            if time.monotonic() > deadline or self._warned or not self.is_alive():
                raise UserError(f"{_unreachable(self._failure)}. Start it, or set MLFLOW_TRACKING_URI, and run again.")
        assert self._sender
        return self._sender.run_id

    def finish(self, seconds: float) -> None:
        """Give the server a last chance, then let the stage end."""
        self._closing.set()
        self.join(seconds)
        if not self.is_alive():
            self._journal.lock.release()
        if self._journal.folder.exists():
            self._warn()

    def _warn(self, more: str = "") -> None:
        if not self._warned:
            print(
                f"warning: {_unreachable(self._failure)}. What the stage logs is kept in "
                f"{JOURNALS / self._journal.id}. {more}\n"
                "To send what MLflow missed, once it can be reached: python -m tasks.tracking replay",
                file=sys.stderr,
            )
        self._warned = True


def _unreachable(error: Exception | None) -> str:
    where = masked(tracking_uri())
    if error is None:
        return f"MLflow at {where} has not answered in time"
    while error.__context__ is not None and isinstance(error.__context__, Exception):  # down to what happened first
        error = error.__context__
    reason = masked(str(error)).strip().splitlines() or [type(error).__name__]
    return f"MLflow at {where} cannot be reached ({reason[0][:200]})"


# ---------------------------------------------------------------------------------------------------------------------
# Sending


class Sender:
    """Applies a journal's events to one MLflow run. Sending everything twice leaves what sending it once does."""

    def __init__(self, client: MlflowClient, journal: Journal) -> None:
        self._client = client
        self._journal = journal
        self._start: Event = {}
        self._sent = 0  # lines
        self.run_id = ""
        self.done = False

    def send_new(self, over: bool = False) -> None:
        """Send the lines that have come since. `over`: the stage has ended, so a journal without an end was killed."""
        events = self._journal.events(self._sent)
        if self._sent == 0 and events:
            self._begin(events[0])
        self._log_metrics([event for event in events if event["kind"] == "metrics"])
        for event in events:
            if event["kind"] not in ("start", "metrics", "end"):
                getattr(self, f"_log_{event['kind']}")(event)
        self._sent += len(events)
        last = self._journal.events()[-1:] if over and not events else events[-1:]
        if last and (over or last[0]["kind"] == "end"):
            self._end(last[0].get("status", "KILLED"), last[0]["time"])

    def _begin(self, start: Event) -> None:
        experiment = _experiment(self._client)
        tags = start["tags"]
        with _machine_lock():
            found = _runs(self._client, experiment, {"rlhf.journal": tags["rlhf.journal"]})
            parent = _pipeline_run(
                self._client, experiment, tags["pipeline.id"], start["pipeline_time"], start.get("pipeline_name", "")
            )
            if found:
                self.run_id = found[0]
            else:
                run = self._client.create_run(
                    experiment, start["time"], {**tags, "mlflow.parentRunId": parent}, start["stage"]
                )
                self.run_id = run.info.run_id
        self._start, self._parent = start, parent
        if not start["flow"]:
            self._client.update_run(parent, status="RUNNING")
        for run_id in (self.run_id, parent):
            _log_params(self._client, run_id, start["params"])

    def _log_metrics(self, events: list[Event]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, event["time"], event["step"])
            for event in events
            for key, value in event["values"].items()
        ]
        _log_metrics(self._client, self.run_id, metrics)
        _log_metrics(self._client, self._parent, [metric for metric in metrics if not metric.key.startswith(OWN)])

    def _log_note(self, event: Event) -> None:
        for run_id in (self.run_id, self._parent):
            self._client.set_tag(run_id, NOTE, event["text"])

    def _log_tags(self, event: Event) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in event["tags"].items()]
        self._client.log_batch(self.run_id, tags=tags)
        if shared := [tag for tag in tags if tag.key in SHARED]:
            self._client.log_batch(self._parent, tags=shared)

    def _log_datasets(self, event: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        context = [InputTag("mlflow.data.context", self._start["stage"])]
        inputs = [
            DatasetInput(Dataset(path, digest[:36], "dvc", json.dumps({"path": path, "md5": digest})), context)
            for path, digest in event["datasets"].items()
        ]
        if inputs:
            self._client.log_inputs(self.run_id, inputs)

    def _log_table(self, event: Event) -> None:
        columns = list(dict.fromkeys(key for row in event["rows"] for key in row))
        table = {"columns": columns, "data": [[row.get(column) for column in columns] for row in event["rows"]]}
        file = f"{event['name']}.json"
        # `client.log_table` appends to the table that is there; this replaces it
        self._client.log_text(self.run_id, json.dumps(table, ensure_ascii=False), file)
        shown = json.loads(self._client.get_run(self.run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        if file not in [entry["path"] for entry in shown]:
            shown.append({"path": file, "type": "table"})
            self._client.set_tag(self.run_id, "mlflow.loggedArtifacts", json.dumps(shown))

    def _log_artifact(self, event: Event) -> None:
        self._client.log_artifact(self.run_id, str(self._journal.folder / "artifacts" / event["name"]))

    def _end(self, status: str, when: int) -> None:
        self._client.set_terminated(self.run_id, status, when)
        if not self._start["flow"]:  # nobody knows which stage of a bare `dvc repro` is the last
            self._client.set_terminated(self._parent, status, when)
        self.done = True


def _log_params(client: MlflowClient, run_id: str, values: Mapping[str, str]) -> None:
    """What the run has stays: MLflow refuses another value, such as of a params.yaml edited between two stages."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    params = [Param(key, value) for key, value in values.items() if key not in known]
    for at in range(0, len(params), 100):  # the server's limit
        client.log_batch(run_id, params=params[at : at + 100])


def _log_metrics(client: MlflowClient, run_id: str, metrics: Sequence[Any]) -> None:
    for at in range(0, len(metrics), 1000):  # the server's limit
        _log_batch(client, run_id, metrics[at : at + 1000])


def _log_batch(client: MlflowClient, run_id: str, metrics: Sequence[Any]) -> None:
    """One metric that the server refuses must not keep the others from it, nor the run from its end."""
    from mlflow.exceptions import MlflowException

    try:
        client.log_batch(run_id, metrics=metrics)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        if len(metrics) == 1:
            print(f"warning: MLflow refuses the metric {metrics[0].key}: {error.message}", file=sys.stderr)
            return
        middle = len(metrics) // 2
        _log_batch(client, run_id, metrics[:middle])
        _log_batch(client, run_id, metrics[middle:])


def _log_again(client: MlflowClient, made: str, pipeline: str) -> None:
    """What a run that is over logged, on a pipeline's run too: so that pipelines compare whatever each found cached."""
    run = client.get_run(made)
    _log_params(client, pipeline, run.data.params)
    curves = [client.get_metric_history(made, key) for key in run.data.metrics if not key.startswith(OWN)]
    _log_metrics(client, pipeline, [point for curve in curves for point in curve])
    for key in (NOTE, *SHARED):
        if key in run.data.tags:
            client.set_tag(pipeline, key, run.data.tags[key])


def _experiment(client: MlflowClient) -> str:
    """The experiment's id; made where it is missing. Two processes may come at once."""
    uri, name = tracking_uri(), os.environ.get("RLHF_EXPERIMENT", EXPERIMENT)
    # beside the database, wherever the current folder is
    artifacts = (
        f"file://{Path(uri.removeprefix('sqlite:///')).parent / 'mlartifacts'}" if uri.startswith("sqlite") else None
    )
    with _machine_lock():
        experiment = client.get_experiment_by_name(name)
        tags, id = ({}, "") if experiment is None else (experiment.tags, str(experiment.experiment_id))
        id = id or str(client.create_experiment(name, artifact_location=artifacts))
        for key, value in _LAYOUT.items():
            if tags.get(key) != value:
                client.set_experiment_tag(id, key, value)
    return id


def experiments(client: MlflowClient) -> list[str]:
    """Ids of those that a stage's run may be in: DVC takes over what a quick run made, if it is the same."""
    found = [client.get_experiment_by_name(name) for name in (EXPERIMENT, QUICK_EXPERIMENT)]
    return [str(experiment.experiment_id) for experiment in found if experiment is not None]


# What MLflow's page of the experiment opens with: columns and their widths, of which the first nine fit a page of 1,400
# pixels. The view is as its own button "Save as new view" writes it.
_COLUMNS = {
    "attributes.`Run Name`": 300,
    "runDateAndNestInfo": 130,
    "tags.`gates`": 170,
    **{f"metrics.`all/{name}`": 90 for name in ("win_rate", "gold", "score", "kl")},
    "tags.`policy`": 80,
    "duration": 80,
    **{f"params.`{name}`": 110 for name in ("seed", "ppo.kl_coef", "ppo.learning_rate", "ppo.updates")},
    "metrics.`all/score_win_rate`": 110,
}
# The page of charts begins with it. MLflow's page "Compare" has the same switch, and no way to set it.
_DIFFERS = {
    "type": "DIFFERENCE",
    "uuid": "differs",
    "chartName": "Parameters and figures that differ",
    "compareGroups": ["Parameters", "Model metrics"],
    "showDifferencesOnly": True,
    "showChangeFromBaseline": False,
    "baselineColumnUuid": "",
    "runsCountToCompare": 10,
    "metricSectionId": "differs",
    "deleted": False,
    "isGenerated": False,
}
_LAYOUT = {
    "mlflow.experimentKind": "custom_model_development",
    NOTE: "One run a pipeline; its stages are the runs below it. `all/...`: what came out of it, on held-out prompts.",
    f"mlflow.sharedViewState.{VIEW}": json.dumps(
        {
            "name": "At a glance",
            "createdAt": 0,
            "updatedAt": 0,
            "state": json.dumps(
                {
                    "selectedColumns": [name for name in _COLUMNS if "." in name],
                    "columnOrder": list(_COLUMNS),
                    "columnWidths": _COLUMNS,
                    "orderByKey": "attributes.start_time",
                    "orderByAsc": False,
                    "compareRunSections": [
                        {"uuid": "differs", "name": "What differs", "display": True, "columns": 1, "cardHeight": 500},
                        {"uuid": "all", "name": "all", "display": True},
                    ],
                    "compareRunCharts": [_DIFFERS],
                    "isAccordionReordered": True,  # else MLflow puts its own sections first
                }
            ),
        }
    ),
}


def _pipeline_run(client: MlflowClient, experiment: str, pipeline_id: str, started: float, name: str = "") -> str:
    """The run that is the parent of the pipeline's stages, found by the pipeline's id or made."""
    tags = {"pipeline.id": pipeline_id, "rlhf.kind": "pipeline"}
    with _machine_lock():
        found = _runs(client, experiment, tags)
        if found:
            return found[0]
        return str(client.create_run(experiment, int(started * 1000), tags, name or run_name()).info.run_id)


def _runs(client: MlflowClient, experiment: str, tags: dict[str, str]) -> list[str]:
    """Ids of the runs that bear all these tags, newest first."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment], query, max_results=10, order_by=["attributes.start_time DESC"])
    return [run.info.run_id for run in found]


def _machine_lock() -> Any:
    """Between the processes of this workspace: look and make must be one step. It may be taken again by its holder."""
    from filelock import FileLock

    STATE.mkdir(exist_ok=True)
    return FileLock(STATE.resolve() / "mlflow.lock", is_singleton=True, timeout=60)


# ---------------------------------------------------------------------------------------------------------------------
# Replay


def _send_left(client: MlflowClient, journal: Journal) -> None:
    """Send a journal whose stage is over, and remove it."""
    with journal.lock.acquire(timeout=1):
        if journal.events():
            Sender(client, journal).send_new(over=True)
        journal.remove()


def replay() -> int:
    """Send what the server missed; returns how many stage runs that was."""
    journals = Journal.left()
    if journals:
        client = connect()
        for journal in journals:
            _send_left(client, journal)
    return len(journals)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.tracking", description="The record of runs in MLflow.")
    commands = parser.add_subparsers(dest="command", required=True)
    help_text = "send to MLflow what stages logged while it could not be reached; safe to repeat"
    commands.add_parser("replay", help=help_text, description=help_text)
    parser.parse_args(argv)
    try:
        sent = replay()
    except Exception as error:
        print(f"error: {_unreachable(error)}. {len(Journal.left())} stage runs are still to be sent.", file=sys.stderr)
        return 2
    print(f"{sent} stage runs sent to {masked(tracking_uri())}." if sent else "Nothing to send.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
