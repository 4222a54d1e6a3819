"""Studies over several runs: the statistics, and what they say of points that failed."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from flows import studies
from flows.studies import curve, main, spread
from tests.flows.toy import Toy
from tests.tiny import shell


def test_spread_is_students() -> None:
    values = [0.185, 0.195, 0.246]
    found = spread(values)
    assert found["mean"] == pytest.approx(0.2086667)
    assert found["standard_deviation"] == pytest.approx(0.0327159, abs=1e-6)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["low"] == pytest.approx(low)
    assert found["high"] == pytest.approx(high)
    assert found["seeds"] == 3


def test_the_curve_leaves_out_points_that_failed() -> None:
    point = {
        "reward.train_prompts": 12,
        "reward.accuracy": 0.7,
        "reward.accuracy_low": 0.6,
        "reward.accuracy_high": 0.8,
    }
    assert curve([{"share": 0.5, "result": "Failed"}]) == ""
    picture = curve([{"share": 0.5, "result": "Failed"}, point, point | {"reward.train_prompts": 24}])
    drawn = base64.b64decode(picture.partition("base64,")[2].rstrip(")")).decode()
    assert drawn.startswith("<svg")
    assert picture == curve([point, point | {"reward.train_prompts": 24}]), "the same each time"


variance: Any = studies.variance  # a flow called as a flow, with its state
STUDIED = """
  {stage}:
    cmd: python study.py {name}
    deps: [study.py]
    params: [seed, reward]
    metrics: [{{data/reports/{name}/metrics.json: {{cache: false}}}}]
"""
STUDY = """
import json, sys
from pathlib import Path
from ruamel.yaml import YAML

params = YAML(typ="safe").load(Path("params.yaml"))
share, seed = params["reward"]["label_share"], params["seed"]
if seed == 13:
    sys.exit("error: an unlucky number")
reports = {
    "reward": {"reward": {"train_prompts": int(80 * share), "accuracy": 0.5 + share / 4,
                          "accuracy_low": 0.4, "accuracy_high": 0.8}},
    "evaluation": {"gold": {"gain": seed / 10, "sft": 0.5}, "kl": 9.0 + seed, "score_win_rate": 0.5},
}
file = Path("data/reports", sys.argv[1], "metrics.json")
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text(json.dumps(reports[sys.argv[1]]))
"""


@pytest.fixture
def repository(in_toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages with the names that the studies run, whose figures follow from the parameters."""
    root = in_toy.root
    stages = [("reward", "reward"), ("report", "evaluation")]
    (root / "dvc.yaml").write_text(
        "stages:" + "".join(STUDIED.format(stage=stage, name=name) for stage, name in stages)
    )
    (root / "study.py").write_text(STUDY)
    (root / "params.yaml").write_text("seed: 1\nreward: {label_share: 1.0}\n")
    (root / ".gitignore").write_text("/.rlhf/\n/.remote/\n")
    monkeypatch.setattr("flows.rlhf.load_params", lambda _path: None)
    shell(root, "dvc", "remote", "add", "--quiet", "--force", "--default", "local", str(root.parent / "remote"))
    shell(root, "git", "add", ".")
    shell(root, "git", "-c", "user.name=T", "-c", "user.email=t@example.com", "commit", "--quiet", "-m", "Toy")
    return root


def test_variance_over_three_seeds(repository: Path) -> None:
    before = shell(repository, "git", "rev-parse", "HEAD")
    state = variance([1, 2, 6], return_state=True)
    assert state.is_completed(), state.message
    rows = {row["figure"]: row for row in state.result()}
    assert rows["gold.gain"] == {"figure": "gold.gain", **spread([0.1, 0.2, 0.6])}
    assert rows["kl"]["mean"] == pytest.approx(12.0)
    assert rows["gold.sft"]["standard_deviation"] == 0
    assert rows["score_win_rate"]["mean"] == 0.5
    assert shell(repository, "git", "rev-parse", "HEAD") == before, "the repository itself stays as it is"


def test_a_seed_that_fails_is_told_and_the_others_count(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.scheduled.pipeline.retries", 0)
    state = variance([1, 13, 2], return_state=True)
    assert state.is_completed()
    assert state.message == "2 of 3 seeds"
    failed = variance([1, 13], return_state=True)
    assert failed.is_failed()
    assert failed.message == "1 of 2 runs ended well; two are needed"


def test_a_figure_that_a_run_lacks_is_left_out(repository: Path) -> None:
    """A seed may split the prompts so that none of the held-out ones has a ticket, and so no gold score."""
    study = repository / "study.py"
    study.write_text(
        study.read_text() + 'if seed == 2:\n    reports["evaluation"].pop("gold")\n'
        "file.write_text(json.dumps(reports[sys.argv[1]]))\n"
    )
    shell(repository, "git", "-c", "user.name=T", "-c", "user.email=t@example.com", "commit", "--quiet", "-am", "Less")
    state = variance([1, 2], return_state=True)
    assert state.is_completed(), state.message
    assert [row["figure"] for row in state.result()] == ["score_win_rate", "kl"]


def test_data_efficiency(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "curve.svg"
    assert main(["data-efficiency", "--shares", "1", "0.25", "--figure", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "0.5625" in shown  # 0.5 + 0.25 / 4
    assert "0.75" in shown
    assert picture.read_text().startswith("<svg")


@pytest.mark.parametrize(
    "command", [["variance", "--seeds", "1", "1"], ["data-efficiency", "--shares", "0"]], ids=["one seed", "no labels"]
)
def test_a_study_that_says_nothing_is_refused(
    repository: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: ")
