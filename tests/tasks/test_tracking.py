"""The record in MLflow: nothing is lost, nothing is doubled, and training waits for nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import tracking
from tasks.ancestry import Store, made_by
from tasks.lineage import StageSpec, hash_path
from tasks.params import Params, load_params
from tasks.tracking import Journal, Tracker

ROOT = Path(__file__).parents[2]
SPEC = StageSpec(
    name="sft",
    cmd="python -m tasks.run sft",
    deps=("tasks/sft.py", "data/models/base", "data/collected/demonstrations"),
    params=("seed", "sft"),
    outs=("data/models/sft",),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return server
        except OSError:
            time.sleep(0.3)
    raise AssertionError("mlflow server did not start")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's real server on loopback."""
    port = free_port()
    process = start_server(tmp_path_factory.mktemp("mlflow"), port)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stage's inputs, where MLflow is on SQLite unless the test says otherwise."""
    monkeypatch.chdir(tmp_path)
    for variable in ("MLFLOW_TRACKING_URI", "RLHF_PIPELINE_ID", "RLHF_FLOW_RUN_ID", "RLHF_TASK_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "_failed_at", {})
    for path in ("data/models/base/weights", "data/collected/demonstrations/rows.jsonl", "data/models/sft/weights"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(path)
    return tmp_path


def log_a_stage(params: Params) -> None:
    with Tracker.for_stage(SPEC, params) as tracker:
        for step in range(3):
            tracker.metrics({"sft/loss": 3.0 - step, "sft/accuracy": step / 2}, step)
        tracker.table("samples", [{"prompt": "a", "reply": "b"}, {"prompt": "c", "score": 1.5}])
        Path("plot.txt").write_text("a plot")
        tracker.artifact(Path("plot.txt"))
        Path("plot.txt").write_text("changed later")
        tracker.metrics({"sft/share": 0.123456})
        tracker.tags({"gates": "passed", "more": "of the stage alone"})
        tracker.note("- it **worked**")
        tracker.outs({"data/models/sft": Path("data/models/sft")})


def assert_on_the_pipeline(pipeline: Any) -> None:
    """What `log_a_stage` says of the pipeline, once."""
    points = history(pipeline)
    curves = {"sft/loss": [(0, 3.0), (1, 2.0), (2, 1.0)], "sft/accuracy": [(0, 0.0), (1, 0.5), (2, 1.0)]}
    assert points == {**curves, "sft/share": [(0, 0.1235)]}, "figures are rounded as people read them, curves are not"
    assert pipeline.data.tags["gates"] == "passed"
    assert "more" not in pipeline.data.tags
    assert not [key for key in pipeline.data.metrics if key.startswith("system/")]
    assert {key.split(".")[0] for key in pipeline.data.params} == {"seed", "sft"}
    assert pipeline.data.tags[tracking.NOTE] == "- it **worked**"


def stage_runs() -> list[Any]:
    client = tracking.connect()
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], "tags.`dvc.stage` LIKE '%'")) if experiment else []


def pipeline_runs() -> list[Any]:
    client = tracking.connect()
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], "tags.`rlhf.kind` = 'pipeline'"))


def history(run: Any) -> dict[str, list[tuple[int, float]]]:
    client = tracking.connect()
    return {
        key: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
        if not key.startswith("system/")
    }


def assert_recorded(run: Any) -> None:
    """What `log_a_stage` logs is there, once."""
    assert run.info.run_name == "sft"
    assert run.info.status == "FINISHED"
    points = history(run)
    assert points["sft/loss"] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert points["sft/accuracy"] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert len(points["time/seconds"]) == 1
    client = tracking.connect()
    assert sorted(file.path for file in client.list_artifacts(run.info.run_id)) == ["plot.txt", "samples.json"]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "samples.json")).read_text())
    assert table == {"columns": ["prompt", "reply", "score"], "data": [["a", "b", None], ["c", None, 1.5]]}
    assert Path(client.download_artifacts(run.info.run_id, "plot.txt")).read_text() == "a plot"
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]
    datasets = [(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs]
    digest = hash_path(Path("data/collected/demonstrations"))
    assert datasets == [("data/collected/demonstrations", digest)]
    assert run.data.tags["dvc.dep.data/collected/demonstrations"] == digest
    assert run.data.tags["dvc.dep.data/models/base"] == hash_path(Path("data/models/base"))
    assert run.data.tags["dvc.out.data/models/sft"] == hash_path(Path("data/models/sft"))
    assert {key.split(".")[0] for key in run.data.params} == {"seed", "sft"}
    assert "system/process_peak_memory_megabytes" in run.data.metrics
    assert run.data.tags[tracking.NOTE] == "- it **worked**"
    (pipeline,) = [one for one in pipeline_runs() if one.info.run_id == run.data.tags["mlflow.parentRunId"]]
    assert_on_the_pipeline(pipeline)


def test_a_stage_on_sqlite(workspace: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FLOW_RUN_ID", "flow-1")
    monkeypatch.setenv("RLHF_TASK_RUN_ID", "task-1")
    log_a_stage(params)
    (run,) = stage_runs()
    assert_recorded(run)
    assert run.data.params["sft.learning_rate"] == "0.0005"
    tags = run.data.tags
    assert (tags["prefect.flow_run_id"], tags["prefect.task_run_id"]) == ("flow-1", "task-1")
    assert (tags["git.commit"], tags["git.dirty"]) == ("none", "true")
    (pipeline,) = pipeline_runs()
    assert tags["mlflow.parentRunId"] == pipeline.info.run_id
    assert tags["pipeline.id"] == pipeline.data.tags["pipeline.id"]
    assert pipeline.info.status == "FINISHED"
    assert not list(tracking.JOURNALS.iterdir()), "a journal that was sent is removed"
    assert (workspace / "mlflow.db").exists()


def test_an_account_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a KeyError, as of a number that is not in /etc/passwd
    assert tracking.account() == str(os.getuid())


def test_down_then_up_then_replayed_twice(
    params: Params, server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nobody = f"http://somebody:secret@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    monkeypatch.setenv("RLHF_PIPELINE_ID", "down-then-up")
    started = time.monotonic()
    log_a_stage(params)
    assert time.monotonic() - started < 120
    said = capfd.readouterr().err
    assert said.count("warning: MLflow at http://***@127.0.0.1") == 1
    assert "python -m tasks.tracking replay" in said
    assert "secret" not in said
    assert tracking.main(["replay"]) == 2
    assert "1 stage runs are still to be sent" in capfd.readouterr().err

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    (journal,) = Journal.left()
    tracking.Sender(tracking.connect(), journal).send_new()  # everything arrives, and is then sent again
    assert tracking.main(["replay"]) == 0
    assert tracking.main(["replay"]) == 0
    out = capfd.readouterr().out
    assert "1 stage runs sent" in out
    assert "Nothing to send." in out
    runs = [run for run in stage_runs() if run.data.tags["pipeline.id"] == "down-then-up"]
    assert len(runs) == 1
    assert_recorded(runs[0])
    assert tracking.stage_run_url("down-then-up", "sft").startswith(f"{server}/#/experiments/")


def test_training_does_not_wait_for_a_server_that_hangs(
    params: Params, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as silent:  # it accepts and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(tracking, "LAST_CHANCE_SECONDS", 1.0)
        with Tracker.for_stage(SPEC, params) as tracker:
            slowest = 0.0
            for step in range(200):
                before = time.monotonic()
                tracker.metrics({"sft/loss": 1.0}, step)
                slowest = max(slowest, time.monotonic() - before)
                time.sleep(0.005)
            closing = time.monotonic()
        assert time.monotonic() - closing < 9
        assert slowest < 5, "a request would have waited 10 s"
        assert "has not answered in time" in capfd.readouterr().err
        (folder,) = tracking.JOURNALS.iterdir()
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert sum("sft/loss" in event.get("values", {}) for event in events) == 200


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_status_tells_how_the_stage_ended(
    params: Params, error: type[BaseException], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "KILLED_SECONDS", 30.0)
    with pytest.raises(error), Tracker.for_stage(SPEC, params):
        raise error
    (run,) = stage_runs()
    assert run.info.status == status
    assert pipeline_runs()[0].info.status == status


def test_a_stage_killed_outright_is_put_on_record_when_its_pipeline_ends() -> None:
    code = (
        "import os, signal, pathlib\n"
        "from tests.tasks.test_tracking import SPEC, Tracker, load_params, ROOT\n"
        "with Tracker.for_stage(SPEC, load_params(ROOT / 'params.yaml')) as tracker:\n"
        "    tracker.metrics({'sft/loss': 1.0}, 0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RLHF_PIPELINE_ID": "killed"}
    tracking.open_pipeline("killed", {"git.commit": "abc"})
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    with next(tracking.JOURNALS.glob("*/events.jsonl")).open("a") as journal:
        journal.write('{"kind": "metr')  # the line that it was writing
    tracking.close_pipeline("killed", "FAILED")
    (run,) = stage_runs()
    assert run.info.status == "KILLED"
    assert history(run)["sft/loss"] == [(0, 1.0)]
    (pipeline,) = pipeline_runs()
    assert (pipeline.info.status, pipeline.data.tags["git.commit"]) == ("FAILED", "abc")
    assert not list(tracking.JOURNALS.iterdir())


def test_a_cached_stage_is_linked_by_its_hashes(
    params: Params,
) -> None:
    log_a_stage(params)
    (run,) = stage_runs()
    outs = {"data/models/sft": hash_path(Path("data/models/sft"))}
    url = tracking.link_cached("next", SPEC, outs)
    assert url == f"http://127.0.0.1:5000/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    (pipeline,) = [one for one in pipeline_runs() if one.data.tags["pipeline.id"] == "next"]
    assert pipeline.data.tags["cached.sft"] == run.info.run_id
    assert_on_the_pipeline(pipeline)
    tracking.link_cached("next", SPEC, outs)  # a second time
    assert_on_the_pipeline(tracking.connect().get_run(pipeline.info.run_id))
    assert tracking.link_cached("next", SPEC, {"data/models/sft": "another"}) == ""
    assert tracking.stage_run_url("next", "sft") == ""


def test_a_quick_run_is_kept_apart_and_what_dvc_takes_over_of_it_is_found(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_EXPERIMENT", tracking.QUICK_EXPERIMENT)
    log_a_stage(params)
    assert stage_runs() == []
    monkeypatch.delenv("RLHF_EXPERIMENT")
    outs = {"data/models/sft": hash_path(Path("data/models/sft"))}
    assert tracking.link_cached("next", SPEC, outs)
    (pipeline,) = pipeline_runs()
    assert pipeline.data.tags["pipeline.id"] == "next"
    assert_on_the_pipeline(pipeline)
    client = tracking.connect()
    maker = client.get_run(pipeline.data.tags["cached.sft"])
    quick = client.get_experiment_by_name(tracking.QUICK_EXPERIMENT)
    assert maker.info.experiment_id == quick.experiment_id
    (md5,) = outs.values()
    assert made_by(client, "sft", outs, Store(ROOT)).outs["data/models/sft"] == md5


def test_the_flow_sends_what_stages_leave_to_it(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_SENDS", "flow")
    monkeypatch.setenv("RLHF_PIPELINE_ID", "ours")
    with monkeypatch.context() as stage:
        stage.setattr(tracking, "connect", lambda: pytest.fail("the stage itself asks MLflow"))
        log_a_stage(params)
    url = tracking.stage_run_url("ours", "sft")
    (run,) = stage_runs()
    assert url.endswith(f"/runs/{run.info.run_id}")
    assert_recorded(run)
    (pipeline,) = pipeline_runs()
    assert_on_the_pipeline(pipeline)
    assert not list(tracking.JOURNALS.iterdir())


def test_a_note_says_why_a_pipeline_failed_and_parameters_edited_meanwhile_harm_nothing(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_a_stage(params)
    (first,) = pipeline_runs()
    monkeypatch.setenv("RLHF_PIPELINE_ID", first.data.tags["pipeline.id"])
    log_a_stage(params.model_copy(update={"seed": params.seed + 1}))
    tracking.close_pipeline(first.data.tags["pipeline.id"], "FAILED", "- **ppo failed**: disk full")
    (pipeline,) = pipeline_runs()
    assert pipeline.data.params["seed"] == str(params.seed)
    assert {run.data.params["seed"] for run in stage_runs()} == {str(params.seed), str(params.seed + 1)}
    assert pipeline.data.tags[tracking.NOTE] == "- **ppo failed**: disk full"
    assert not list(tracking.JOURNALS.iterdir())


def test_the_flow_is_not_held_up_where_mlflow_is_down(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    tracking.open_pipeline("p", {})
    assert tracking.link_cached("p", SPEC, {"data/models/sft": "x"}) == ""
    assert tracking.stage_run_url("p", "sft") == ""
    tracking.close_pipeline("p", "FINISHED")
    assert time.monotonic() - started < 120
    assert capfd.readouterr().err.count("warning:") == 1


def test_stages_that_start_at_once_on_a_new_database_share_one_parent() -> None:
    code = (
        "import sys\n"
        "from tests.tasks.test_tracking import SPEC, Tracker, load_params, ROOT\n"
        "with Tracker.for_stage(SPEC, load_params(ROOT / 'params.yaml')) as tracker:\n"
        "    [tracker.metrics({'sft/loss': 1.0}, step) for step in range(50)]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RLHF_PIPELINE_ID": "together"}
    stages = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [stage.wait() for stage in stages] == [0, 0, 0]
    (pipeline,) = pipeline_runs()
    runs = stage_runs()
    assert len(runs) == 3
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {pipeline.info.run_id}
    assert [len(history(run)["sft/loss"]) for run in runs] == [50, 50, 50]


def test_stages_of_one_dvc_process_share_a_pipeline(workspace: Path) -> None:
    """DVC is found among the ancestors by the name of its program."""
    program = workspace / "dvc"
    program.write_text(
        "import subprocess, sys\n"
        "for _ in range(2):\n"
        "    subprocess.run([sys.executable, '-c', 'from tasks.tracking import _pipeline; print(*_pipeline())'])\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, str(program)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
        ).stdout.split("\n")
        for _ in range(2)
    ]  # fmt: skip
    (first, second, _), (third, _, _) = outputs
    assert first == second
    assert first.endswith("False")
    assert first != third


def test_a_metric_that_the_server_refuses_does_not_take_others_with_it(
    params: Params, capfd: pytest.CaptureFixture[str]
) -> None:
    with Tracker.for_stage(SPEC, params) as tracker:
        tracker.metrics({"good": 1.0, "b?d": 2.0, "fine": float("nan")})
    (run,) = stage_runs()
    assert run.info.status == "FINISHED"
    assert {"good", "fine"} <= set(run.data.metrics)
    assert "refuses the metric b?d" in capfd.readouterr().err


def test_flat_params_takes_declared_sections_alone(params: Params) -> None:
    assert tracking.flat_params(params, ("seed", "rank", "data", "prepare")) == {
        "seed": "1",
        "rank.labeler": "simulated",
        "data.sources": "[{'kind': 'prompts', 'path': 'data/tickets'}]",
        "rank.held_out_share": "0.2",
        "rank.human.labels": "1",
        "rank.human.shared_share": "0.2",
        "rank.human.shared_labels": "3",
        "rank.human.set_aside_after": "2",
        "rank.human.leave_out": "[]",
        "rank.human.fill_in": "False",
        "rank.human.aggregation": "each",
        "rank.human.held_out_labelers": "[]",
        "prepare.splits.sft": "0.3",
        "prepare.splits.reward": "0.3",
        "prepare.splits.ppo": "0.3",
        "prepare.splits.eval": "0.1",
        "prepare.share_prompts": "False",
        "prepare.duplicate_limit": "0.05",
        "prepare.damaged_limit": "0.05",
        "prepare.near_duplicate": "0.8",
        "prepare.common_prefix": "200",
        "prepare.user_cap": "200",
        "prepare.mask": "[]",
    }


def test_passwords_are_masked() -> None:
    assert tracking.masked("postgresql://me:pa55@db/x and http://a.b/c@d") == "postgresql://***@db/x and http://a.b/c@d"


def test_in_memory_tracker_keeps_events() -> None:
    events: list[dict[str, Any]] = []
    Tracker.in_memory(events).metrics({"a": 1}, step=2)
    assert events == [{"kind": "metrics", "values": {"a": 1.0}, "step": 2}]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tracking.main(["--help"])
    assert stop.value.code == 0
    assert "replay" in capsys.readouterr().out
