"""A stage's report, for programs and for DVC."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.datasets import format_interval, read_figures, rounded, write_figures

FIGURES = {"gold": {"policy": 0.80712345, "gain": 0.20194, "gain_low": 0.16301, "gain_high": 0.24}, "judge": None}


def test_a_report_shows_dvc_a_few_and_keeps_all(tmp_path: Path) -> None:
    write_figures(tmp_path / "metrics.json", FIGURES, ["gold.policy", "judge", "not.there"], intervals=["gold.gain"])
    text = (tmp_path / "metrics.json").read_text()
    assert read_figures(text) == FIGURES
    shown = {name: value for name, value in json.loads(text).items() if not isinstance(value, list)}
    assert shown == {"gold.policy": 0.8071, "gold.gain": "0.202 [0.163, 0.24]"}


def test_a_report_of_an_older_commit() -> None:
    assert read_figures(json.dumps(FIGURES)) == FIGURES


def test_rounding_keeps_counts_and_words() -> None:
    assert [rounded(value) for value in (0.123456, 134515008.0, 134515008, "e1d8", -0.00054321)] == [
        *(0.1235, 134515008.0, 134515008, "e1d8", -0.0005432)
    ]
    assert format_interval({"a": 0.5}, "a") == 0.5
