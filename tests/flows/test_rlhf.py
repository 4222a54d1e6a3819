"""The flow on a toy repository, reporting to a real Prefect server."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from rich.console import Console
from ruamel.yaml import YAML

from flows import dvc_stage
from flows.report import METRICS, REGISTERED, SAMPLES, Report, Row, evaluation, figure_of, print_report
from flows.rlhf import main, needed, rlhf
from tasks.datasets import write_json
from tasks.lineage import load_stages
from tests.flows.toy import ROOT, Toy, a_verdict, ask, wait_until


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

    lock = (in_toy.root / "dvc.lock").read_text(encoding="utf-8")
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
    assert (in_toy.root / "dvc.lock").read_text(encoding="utf-8") == lock


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


@pytest.mark.parametrize(
    ("free", "right"), [(10.0, ""), (5.0, ""), (10.0, ", cores: all")], ids=["both", "memory", "cores"]
)
def test_side_by_side_where_memory_and_cores_allow(
    in_toy: Toy, free: float, right: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_toy.write(left="memory_gb: 4, cores: all", right="memory_gb: 4" + right)
    monkeypatch.setattr(dvc_stage, "available_gigabytes", lambda: free)
    monkeypatch.setenv("TOY_SECONDS_left", "4")
    monkeypatch.setenv("TOY_SECONDS_right", "4")
    assert run()[0].is_completed()
    spans = [[when for _, when in in_toy.times(stage)] for stage in ("left", "right")]
    overlap = min(end for _, end in spans) - max(start for start, _ in spans)
    assert (overlap > 0) == (free == 10.0 and not right)


def test_only_what_the_named_stages_need(in_toy: Toy) -> None:
    assert list(needed(load_stages(in_toy.root), ["left"])) == ["left"]
    assert set(needed(load_stages(in_toy.root), ["last"])) == {"left", "right", "last"}
    _, rows = run(["left"])
    assert list(rows) == ["left"]


def test_what_was_not_part_of_the_run_is_not_shown_and_what_is_out_of_date_is_named(
    in_toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lying_there(in_toy.root, "policy/2 is refused.")
    monkeypatch.setattr("flows.rlhf.load_params", lambda _path: None)
    assert main(["left"]) == 0
    out = capsys.readouterr().out
    assert "Out of date, and not asked for: right, last." in out
    for of_another_run in ("an old answer", "is refused", "report.html"):
        assert of_another_run not in out
    run()
    assert main(["left"]) == 0
    assert "Out of date" not in capsys.readouterr().out


def lying_there(root: Path, headline: str) -> None:
    """What an earlier run left."""
    write_json(root / SAMPLES.parent / "unused.json", {})
    answers = dict.fromkeys(("base", "sft", "policy"), "an old answer")
    (root / SAMPLES).write_text(json.dumps({"prompt": "p", **answers}) + "\n")
    following = [{"command": 'make promote VERSION=policy/2 REASON="..."', "what": "make it the champion"}]
    verdict = a_verdict(headline=headline, next=following)
    write_json(root / REGISTERED, {"verdict": verdict})


def shown(*stages: str, width: int = 80) -> str:
    rows = [Row(stage, "ran", 1.0, f"{stage}.comparisons_extra_of_labelers 1,234,567", "", "") for stage in stages]
    console = Console(width=width, file=StringIO(), record=True)
    print_report(rows, console)
    return console.export_text()


def test_the_end_shows_the_verdict_of_a_run_that_registered_and_folds_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lying_there(tmp_path, "told by register")
    champions = iter([None, SimpleNamespace(version="2"), None])
    monkeypatch.setattr("flows.report.champion", lambda _client: next(champions))
    monkeypatch.setattr("flows.report.connect", lambda: None)
    text = shown("evaluate", "register", "report")
    for part in ("an old answer", "policy/2 is refused: it failed kl.", "make promote VERSION=policy/2", "report.html"):
        assert part in text
    # promoted by hand since: DVC does not run `register` for that, and nobody is asked to do it again
    text = shown("register")
    assert "policy/2 is the champion, though it failed kl." in text
    assert "make promote" not in text
    narrow = shown("register", "comparisons", "comparisons_extra", width=40)
    assert "\u2026" not in narrow
    assert "comparisons_extra" in "".join(re.findall(r"^│ (\S*) *│", narrow, re.MULTILINE))


def test_columns_of_tables_fold_names_and_never_cut_them() -> None:
    for file in (*ROOT.glob("flows/*.py"), *ROOT.glob("tasks/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_column":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("overflow") == "'fold'", f"{file}:{node.lineno}"
                assert "no_wrap" not in options, f"{file}:{node.lineno}"


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
    METRICS.write_text(json.dumps({"score": score, **rate, "overoptimisation": {"kept_update": 0}}))
    assert "the policy is the SFT model" in evaluation()
    assert "win rate" not in evaluation()
    METRICS.write_text(json.dumps({"score": score, **rate}))
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
