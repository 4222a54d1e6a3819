"""The flow on a toy repository, reporting to a real Prefect server."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from ruamel.yaml import YAML

from flows import dvc_stage
from flows.report import METRICS, SAMPLES, Report, Row, evaluation, figure_of
from flows.rlhf import main, needed, rlhf
from tasks.datasets import write_json
from tasks.lineage import load_stages
from tests.flows.toy import Toy, ask, wait_until


def run(targets: list[str] | None = None) -> tuple[State[Report], dict[str, Row]]:
    state = cast("State[Report]", rlhf(targets, return_state=True))
    report = cast("Report", state.result(raise_on_failure=False))
    return state, {row.stage: row for row in report}


def states_in_prefect(state: State[Report]) -> dict[str, tuple[str, str]]:
    """{stage: (name of the state, its message)} as Prefect's page shows them, once they have all arrived there."""
    wanted = {"flow_runs": {"id": {"any_": [str(state.state_details.flow_run_id)]}}}

    def seen() -> list[dict[str, Any]]:
        return cast("list[dict[str, Any]]", ask(str(get_current_settings().api.url), "task_runs/filter", wanted))

    assert wait_until(lambda: all(run["state_type"] not in ("RUNNING", "SCHEDULED") for run in seen()))
    return {run["name"]: (run["state"]["name"], run["state"]["message"]) for run in seen()}


def test_runs_skips_and_restores(in_toy: Toy) -> None:
    state, rows = run()
    assert state.is_completed()
    assert [row.status for row in rows.values()] == ["ran", "ran", "ran"]
    assert rows["last"].figure == "toy.length 13"

    lock = (in_toy.root / "dvc.lock").read_text()
    state, rows = run()
    assert [row.status for row in rows.values()] == ["cached", "cached", "cached"]
    assert {name for name, _ in states_in_prefect(state).values()} == {"Cached"}

    # back from DVC's run cache, without running
    (in_toy.root / "knob.txt").write_text("2")
    run()
    assert in_toy.starts("left") == 2
    (in_toy.root / "knob.txt").write_text("1")
    _, rows = run()
    assert rows["left"].status == "cached"
    assert in_toy.starts("left") == 2
    assert (in_toy.root / "dvc.lock").read_text() == lock


def test_a_failure_shows_the_stage_s_own_words(in_toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    in_toy.write(left="retries: 3")
    (in_toy.root / "fail-left.txt").write_text("mistake")
    assert main([]) == 1
    out, err = capsys.readouterr()
    assert "left failed:\nerror: stage `left`: the raw file is torn" in out
    assert "not run" in out
    assert "Traceback" not in out + err
    assert in_toy.starts("left") == 1  # a user's mistake is the same at the next try
    assert in_toy.starts("last") == 0

    (in_toy.root / "fail-left.txt").write_text("mistake")
    state, rows = run()
    assert state.is_failed()
    assert state.message == "failed: left"
    assert [rows[name].status for name in ("left", "right", "last")] == ["failed", "cached", "not run"]
    assert states_in_prefect(state)["left"] == ("Failed", "error: stage `left`: the raw file is torn")
    assert run()[0].is_completed()


def test_retries_are_set_by_stage(in_toy: Toy) -> None:
    in_toy.write(left="retries: 2")
    (in_toy.root / "fail-left.txt").write_text("crash crash")
    (in_toy.root / "fail-right.txt").write_text("crash")
    state, rows = run()
    assert rows["left"].status == "ran"
    assert in_toy.starts("left") == 3
    assert rows["right"].status == "failed"
    assert rows["right"].told == "about to fail\nValueError: no luck this time"
    assert in_toy.starts("right") == 1
    assert state.is_failed()


@pytest.mark.parametrize("free", [10.0, 5.0])
def test_side_by_side_where_memory_allows(in_toy: Toy, free: float, monkeypatch: pytest.MonkeyPatch) -> None:
    in_toy.write(left="memory_gb: 4", right="memory_gb: 4")
    monkeypatch.setattr(dvc_stage, "available_gigabytes", lambda: free)
    monkeypatch.setenv("TOY_SECONDS_left", "4")
    monkeypatch.setenv("TOY_SECONDS_right", "4")
    assert run()[0].is_completed()
    spans = [[when for _, when in in_toy.times(stage)] for stage in ("left", "right")]
    overlap = min(end for _, end in spans) - max(start for start, _ in spans)
    assert (overlap > 0) == (free == 10.0)


def test_only_what_the_named_stages_need(in_toy: Toy) -> None:
    assert list(needed(load_stages(in_toy.root), ["left"])) == ["left"]
    assert set(needed(load_stages(in_toy.root), ["last"])) == {"left", "right", "last"}
    _, rows = run(["left"])
    assert list(rows) == ["left"]


def test_same_lock_as_dvc_repro(in_toy: Toy) -> None:
    """As content: where two stages ran side by side, the one that ended first stands first."""
    lock = in_toy.root / "dvc.lock"
    run()
    ours = YAML(typ="safe").load(lock)
    lock.unlink()
    subprocess.run(["dvc", "repro", "--quiet", "--force"], check=True)
    assert YAML(typ="safe").load(lock) == ours


def test_waits_for_somebody_else_s_dvc(in_toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_stage, "LOCK_POLL_SECONDS", 0.5)
    monkeypatch.setenv("TOY_SECONDS_left", "5")
    other = subprocess.Popen(["dvc", "repro", "--quiet", "left"])
    while not in_toy.starts("left"):
        time.sleep(0.1)
    state, rows = run(["left"])
    assert other.wait() == 0
    assert state.is_completed()
    assert rows["left"].status == "cached"


def test_unknown_stage_names_the_nearest(in_toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lefd"]) == 2
    assert capsys.readouterr().err == "error: no stage `lefd` in dvc.yaml; did you mean `left`?\n"
    (in_toy.root / "dvc.yaml").unlink()
    assert main([]) == 2
    assert "no dvc.yaml here" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["dvc.lock", "dvc.yaml"])
def test_a_file_that_git_could_not_merge_is_told_once_before_any_server(
    in_toy: Toy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr("flows.rlhf.prefect_server", lambda _: pytest.fail("nothing may start"))
    (in_toy.root / file).write_text("stages:\n<<<<<<< HEAD\n  a: {}\n=======\n  b: {}\n>>>>>>> other\n")
    assert main([]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == said.count(f"{file}, line 2") == 1
    assert f"git checkout --ours {file}" in said


def test_figure_is_found_in_nested_json(in_toy: Toy) -> None:
    spec = load_stages(in_toy.root)["left"]
    (in_toy.root / "left.json").write_text('{"toy": {"length": 0.123456}}')
    assert figure_of(spec, in_toy.root) == "toy.length 0.123"
    either = replace(spec, meta={"figure": "toy.gold or toy.length"})
    assert figure_of(either, in_toy.root) == "toy.length 0.123"
    (in_toy.root / "left.json").write_text('{"toy": 3}')
    assert figure_of(spec, in_toy.root) == ""


def test_the_evaluation_in_markdown_without_a_gold_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    METRICS.parent.mkdir(parents=True)
    score = {name + end: 0.5 for name in ("base", "sft", "policy", "gain") for end in ("", "_low", "_high")}
    rate = {name + end: 0.75 for name in ("score_win_rate", "kl") for end in ("", "_low", "_high")}
    METRICS.write_text(json.dumps({"score": score, **rate}))
    SAMPLES.write_text("")
    told = evaluation()
    assert "There is no gold score: these prompts have no ticket." in told
    assert "- win rate over SFT by the reward model: 0.75 [0.75, 0.75]" in told
    assert "gold |" not in told
    assert "Labels" not in told
    for stage, count in (("demonstrate", "count"), ("rank", "rankings")):
        report = {stage: {count: 9, "by_people": 4, "by_simulated": 5}}
        write_json(tmp_path / f"data/reports/{stage}/metrics.json", report)
    assert "Labels: 9 demonstrations: 4 by people, 5 simulated; 9 rankings: 4 by people, 5 simulated." in evaluation()
    METRICS.write_text(
        json.dumps({"gold": score, "score": score, **rate, "win_rate": 1, "win_rate_low": 1, "win_rate_high": 1})
    )
    assert "| gold | 0.5 [0.5, 0.5] |" in evaluation()
    assert "- win rate over SFT by the gold score: 1 [1, 1]" in evaluation()
