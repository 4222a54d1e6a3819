"""Two runs side by side: commits, the working tree, and runs of MLflow."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.compare import REWARD_MODEL, SAMPLES, WORKING_TREE, Side, figures_table, main, show, side, verdict
from tasks.datasets import SideBySide
from tasks.lineage import hash_path
from tasks.stage import UserError
from tasks.tracking import connect
from tests.tiny import shell, tiny_repo

# MLflow warns of its own code
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]ype hint:UserWarning")


def answers(gold: list[float], word: str) -> list[SideBySide]:
    return [
        SideBySide(
            prompt=f"prompt {place}",
            base="",
            sft="",
            policy=f"{word} {place}",
            scores={"gold.policy": mark, "score.policy": -mark},
        )
        for place, mark in enumerate(gold)
    ]


def write_run(folder: Path, kl_coef: float, rows: list[SideBySide]) -> str:
    """The files that a pipeline run leaves, with the answers in DVC's cache; returns their hash."""
    (folder / "params.yaml").write_text(f"seed: 1\nppo: {{kl_coef: {kl_coef}}}\n")
    gain = sum(row.scores["gold.policy"] for row in rows) / len(rows)
    reports: dict[str, Any] = {
        "evaluation": {"gold": {"gain": gain, "gain_low": gain - 0.01, "gain_high": gain + 0.01}, "prompts": len(rows)},
        "reward": {"reward": {"accuracy": 0.75}},
    }
    for name, report in reports.items():
        (folder / f"data/reports/{name}").mkdir(parents=True, exist_ok=True)
        (folder / f"data/reports/{name}/metrics.json").write_text(json.dumps(report))
    (folder / SAMPLES).write_text("".join(row.model_dump_json() + "\n" for row in rows))
    md5 = hash_path(folder / SAMPLES)
    cached = folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    cached.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / SAMPLES, cached)
    lock = {
        "schema": "2.0",
        "stages": {
            "evaluate": {"cmd": "x", "outs": [{"path": SAMPLES, "md5": md5}]},
            "reward": {"cmd": "x", "outs": [{"path": REWARD_MODEL, "md5": "0123"}]},
            "register": {"cmd": "x"},
        },
    }
    (folder / "dvc.lock").write_text(json.dumps(lock))
    return md5


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits: the second has another parameter, and better answers on every prompt but one."""
    folder = tiny_repo(tmp_path / "repo")
    (folder / ".gitignore").write_text(f"/{SAMPLES}\n/mlflow.db\n")
    for kl_coef, gold in ((0.02, [0.5, 0.4, 0.6, 0.9]), (0.05, [0.7, 0.6, 0.9, 0.9])):
        write_run(folder, kl_coef, answers(gold, f"text of {kl_coef}"))
        shell(folder, "git", "add", ".")
        shell(folder, "git", "commit", "--quiet", "-m", f"Run {kl_coef}")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    return folder


def shown(one: Side, other: Side) -> str:
    screen = io.StringIO()
    show(one, other, Console(file=screen, width=160))
    return screen.getvalue()


def test_two_commits(repository: Path) -> None:
    before, now = side("HEAD~1", repository), side(WORKING_TREE, repository)
    assert before.params == {"seed": "1", "ppo.kl_coef": "0.02"}
    assert now.figures["eval/gold.gain"] == pytest.approx(0.775)
    assert now.figures["reward/accuracy"] == 0.75
    assert now.reward_model == "0123"
    assert [row.policy for row in before.samples][:2] == ["text of 0.02 0", "text of 0.02 1"]
    text = shown(before, now)
    assert "seed" not in text, "what is the same is left out"
    assert "ppo.kl_coef" in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "+0.175 [" in lines["gold"]
    assert "working tree is better" in lines["gold"]
    assert "HEAD~1 is better" in lines["score"]
    assert "88%" in lines["wins by gold"]  # three wins and a tie
    assert "apart" in lines["eval/gold.gain"]
    assert text.index("prompt 2") < text.index("prompt 0")  # 0.3 apart, then 0.2
    assert "text of 0.05 2" in text
    assert "prompt 3" in text or "text of 0.05 3" not in text


def without_gold(rows: list[SideBySide], *places: int) -> list[SideBySide]:
    for place in places:
        del rows[place].scores["gold.policy"]
    return rows


def test_where_there_is_no_gold_score() -> None:
    """Scores of one reward model are compared; those of two are not, and then the answers stay in their order."""
    before, now = (answers(gold, word) for gold, word in (([0.5, 0.4, 0.6], "old"), ([0.6, 0.6, 0.9], "new")))
    one = Side("a", {}, {"kl": 1.0}, without_gold(before, 0, 1, 2), "hash")
    text = shown(one, Side("b", {}, {"kl": 1.0}, without_gold(now, 0, 1, 2), "hash"))
    assert "no gold score: these prompts have no ticket" in text
    assert "a is better" in text
    assert "score.policy" in text
    assert text.index("prompt 2") < text.index("prompt 0")  # 0.3 apart, then 0.1
    text = shown(one, Side("b", {}, {"kl": 1.0}, now, "another"))
    assert "of two reward models: cannot be compared" in text
    assert "is better" not in text
    assert text.index("prompt 0") < text.index("prompt 2")


def test_where_some_prompts_have_a_gold_score() -> None:
    before, now = (answers(gold, word) for gold, word in (([0.5, 0.4, 0.6], "old"), ([0.6, 0.6, 0.9], "new")))
    text = shown(Side("a", {}, {"kl": 1.0}, without_gold(before, 0)), Side("b", {}, {"kl": 1.0}, without_gold(now, 1)))
    assert "gold (1 prompts)" in text
    assert "+0.300 [" in text
    assert "wins by score" in text


def test_the_same_twice(repository: Path) -> None:
    text = shown(side("HEAD", repository), side(WORKING_TREE, repository))
    assert "The parameters are the same." in text
    assert "figures that both have are the same." in text
    assert text.count("no difference") == 4


def test_a_version_against_a_run_of_mlflow(repository: Path) -> None:
    client = connect()
    experiment = client.create_experiment("rlhf")
    client.create_registered_model("policy")
    ids = []
    for number, (kl_coef, gain) in enumerate(((0.02, 0.6), (0.05, 0.775)), start=1):
        run = client.create_run(experiment, tags={"pipeline.id": f"pipe{number}", "dvc.stage": "evaluate"})
        md5 = write_run(repository, kl_coef, answers([gain] * 5, str(kl_coef)))
        client.set_tag(run.info.run_id, f"dvc.out.{SAMPLES}", md5)
        client.set_tag(run.info.run_id, f"dvc.out.{REWARD_MODEL}", f"reward {number}")
        client.log_param(run.info.run_id, "ppo.kl_coef", kl_coef)
        client.log_metric(run.info.run_id, "eval/gold.gain", gain)
        client.log_metric(run.info.run_id, "time/seconds", gain)
        client.set_terminated(run.info.run_id, "FINISHED")
        client.create_model_version("policy", "file:///nowhere", tags={"pipeline.id": f"pipe{number}"})
        ids.append(run.info.run_id)
    one, other = side("policy/1", repository), side(ids[1][:8], repository)
    assert (one.name, one.params, one.figures) == ("policy/1", {"ppo.kl_coef": "0.02"}, {"eval/gold.gain": 0.6})
    assert other.figures == {"eval/gold.gain": 0.775}
    assert len(other.samples) == 5
    assert (one.reward_model, other.reward_model) == ("reward 1", "reward 2")
    assert "apart" not in shown(one, other), "these have no intervals"


def test_only_figures_that_both_have_are_compared_gates_too() -> None:
    """MLflow has more than the reports, and a gate may be named as the end of an interval is."""
    one = Side("a", {}, {"kl": 9.0, "kl_low": 8.0, "kl_high": 10.0, "gate/win_rate_low": 1.0, "same": 0.1})
    other = Side("b", {}, {"kl": 12.0, "kl_low": 11.0, "kl_high": 13.0, "gate/win_rate_low": 0.0, "same": 0.1 + 1e-12})
    table = figures_table(one, Side("b", {}, {**other.figures, "only/here": 3.0}))
    assert not isinstance(table, str)
    assert list(table.columns[0].cells) == ["gate/win_rate_low", "kl"]
    assert list(table.columns[3].cells) == ["", "apart"]


def test_verdicts() -> None:
    assert verdict(0.1, 0.3, 0.0, "a", "b").plain == "b is better"
    assert verdict(-0.3, -0.1, 0.0, "a", "b").plain == "a is better"
    assert verdict(-0.1, 0.2, 0.0, "a", "b").plain == "no difference shown"
    assert verdict(0.5, 0.5, 0.5, "a", "b").plain == "no difference"


def test_what_is_meant_by_nothing_is_told(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere"]) == 2
    assert "`nowhere` is no commit or branch here, no version such as policy/3, and no run of MLflow" in (
        capsys.readouterr().err
    )
    assert main(["now"]) == 2
    assert "give at least 4 characters" in capsys.readouterr().err
    assert main(["policy/9"]) == 2
    assert "has no policy/9" in capsys.readouterr().err
    shell(repository, "git", "rm", "-r", "--quiet", "--cached", "data")
    shell(repository, "git", "commit", "--quiet", "-m", "No reports")
    with pytest.raises(UserError, match="HEAD has no reports in data/reports"):
        side("HEAD", repository)
