"""The table of runs: what each changed, and what came of it."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import runs
from tasks import tracking

LONG = "failed: champion_win_rate_low, relevance_ratio"


def a_run(number: int, params: dict[str, str], metrics: dict[str, float], **tags: str) -> Any:
    from mlflow.entities import Metric, Param, Run, RunData, RunInfo, RunTag

    start = int(datetime(2026, 11, 28, 12, number).timestamp() * 1000)
    info = RunInfo(
        f"{number}" * 32, "1", "ann", "FINISHED" if metrics else "FAILED", start, None, "active", run_name="Start"
    )
    data = RunData(
        [Metric(key, value, 0, 0) for key, value in metrics.items()],
        [Param(key, value) for key, value in params.items()],
        [RunTag(key, value) for key, value in tags.items()],
    )
    return Run(info, data)


def three() -> list[Any]:
    by_gold = {"eval/win_rate": 0.781, "eval/win_rate_low": 0.71, "eval/win_rate_high": 0.853}
    return [
        a_run(3, {"ppo.kl_coef": "0.1", "seed": "2"}, {}),
        a_run(
            2,
            {"ppo.kl_coef": "0.1", "seed": "1"},
            {"all/gold": 0.721, "all/score": -0.209, "all/kl": 5.955, **by_gold},
            gates=LONG,
            policy="policy/2",
        ),
        a_run(1, {"ppo.kl_coef": "0.02", "seed": "1"}, {"all/gold": 0.8071}, gates="passed", policy="policy/1"),
    ]


def test_rows() -> None:
    third, second, first = runs.rows_of(three(), 3, "policy/1")
    assert (third.changed, second.changed, first.changed) == ("seed 1 → 2", "kl_coef 0.02 → 0.1", "Start")
    assert (third.gates, second.gates, first.gates) == ("failed", f"gates {LONG}", "gates passed")
    assert (second.gold, second.score, second.win_rate, second.kl, second.judge) == (
        *("0.721", "-0.209", "78 [71, 85]", "5.96", ""),
    )
    assert [row.is_champion for row in (third, second, first)] == [False, False, True]
    (newest, *_) = runs.rows_of(three(), 1, "", against_first=True)
    assert newest.changed == "kl_coef 0.02 → 0.1, seed 1 → 2"


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_folds_and_cuts_nothing(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(runs.table_of(runs.rows_of(three(), 3, "policy/1")))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= width
    assert "judge" not in said, "nobody judged"
    headings = next(line for line in said.splitlines() if "gold" in line)
    assert all(whole in said for whole in ("22222222", "policy/1 ★", "78 [71, 85]", "-0.209"))
    start, end = said.splitlines()[0].index("what changed"), headings.index("gold")
    cells = "".join(line[start:end] for line in said.splitlines())
    assert "".join(LONG.split()) in "".join(cells.split())


def test_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert runs.main([]) == 2
    assert "make run" in capsys.readouterr().err
    tracking.open_pipeline("one", {"gates": "passed"})
    tracking.open_pipeline("two", {})
    assert runs.main(["--last", "1"]) == 0
    said = capsys.readouterr().out
    assert "running" in said
    assert "passed" not in said
