"""Which figure each limit is held against, and what a miss says."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.gates import FIGURES, evaluate
from tasks.params import Gates

OPEN: dict[str, Any] = dict.fromkeys(Gates.model_fields)
REPORTS: list[dict[str, Any]] = [
    {"prepare": {"failed_checks": 1}},
    {"reward": {"accuracy": 0.75, "calibration_error": 0.125}},
    {
        "win_rate_low": 0.625,
        "kl": 9.5,
        "fluency": {"sft": -2.0, "policy": -2.25},
        "length": {"sft": 40.0, "policy": 30.0},
        "ended": {"sft": 0.5, "policy": 0.9375},
    },
    {"champion": {"win_rate": 0.5, "win_rate_low": 0.4375}},
]


def test_every_limit_has_a_figure() -> None:
    assert set(FIGURES) == set(Gates.model_fields)


@pytest.mark.parametrize(
    ("name", "holds", "fails", "missed_by"),
    [
        ("failed_data_checks", 1, 0, 1.0),
        ("reward_accuracy", 0.75, 0.875, 0.125),
        ("reward_calibration_error", 0.125, 0.0625, 0.0625),
        ("win_rate_low", 0.625, 0.75, 0.125),
        ("champion_win_rate_low", 0.4375, 0.5, 0.0625),
        ("kl", 9.5, 9.0, 0.5),
        ("fluency_loss", 0.25, 0.125, 0.125),  # -2.00 - -2.25
        ("length_ratio_low", 0.75, 1.0, 0.25),  # 30 / 40
        ("length_ratio_high", 0.75, 0.5, 0.25),
        ("ended", 0.9375, 1.0, 0.0625),
    ],
)
def test_a_limit_holds_up_to_its_value_and_says_by_how_much_it_is_missed(
    name: str, holds: float, fails: float, missed_by: float
) -> None:
    (gate,) = evaluate(Gates(**OPEN | {name: holds}), REPORTS)
    assert (gate.passed, gate.missed_by) == (True, 0)
    assert str(gate).endswith("passed")
    (gate,) = evaluate(Gates(**OPEN | {name: fails}), REPORTS)
    assert (gate.passed, gate.missed_by) == (False, missed_by)
    assert str(gate).endswith(f"failed by {missed_by:.3g}")


def test_a_figure_that_is_not_a_number_does_not_hold() -> None:
    for broken in (float("nan"), float("inf"), -float("inf")):
        for name, side in (("kl", "most"), ("win_rate_low", "least")):
            (gate,) = evaluate(Gates(**OPEN | {name: 0.5}), [{"kl": broken, "win_rate_low": broken}])
            assert not gate.passed
            assert str(gate) == f"{name}: not measured, at {side} 0.5 asked: failed"
    silent = {"length": {"sft": 0.0, "policy": 30.0}}
    assert not evaluate(Gates(**OPEN | {"length_ratio_high": 1.5}), [silent])[0].passed


def test_limits_that_are_not_set_are_not_asked() -> None:
    assert evaluate(Gates(**OPEN), REPORTS) == []


def test_what_was_not_measured_does_not_hold() -> None:
    (gate,) = evaluate(Gates(**OPEN | {"ended": 0.5}), REPORTS[:2])
    assert not gate.passed
    assert str(gate) == "ended: not measured, at least 0.5 asked: failed"
