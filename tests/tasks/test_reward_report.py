"""The reward model's report by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tasks.conversations import single
from tasks.datasets import Ranking
from tasks.reward_report import PROBES, Pair, accuracy, by_slice, calibration_error, pairs_of, probed, reliability


def ranking(ranks: list[int], responses: list[str], labeler: str = "ada", prompt: str = "p") -> Ranking:
    return Ranking(
        id="x",
        prompt=single(prompt),
        responses=responses,
        ended=[True] * len(ranks),
        ranks=ranks,
        labeler=labeler,
        held_out=True,
    )


def test_pairs_by_hand() -> None:
    row = ranking([2, 1, 4, 1], ["one two", "one", "one two three", "a b c d"])
    (first, *rest) = pairs_of([row], [torch.tensor([0.5, 2.0, 1.0, 0.0])])
    assert first == Pair("x", 0, margin=-0.5, distance=2, words=-1)  # the first against the third
    assert rest == [
        Pair("x", 0, 1.5, 1, -1),  # the second against the first
        Pair("x", 0, 1.0, 3, -2),  # against the third
        Pair("x", 0, -0.5, 1, 2),  # the fourth against the first
        Pair("x", 0, -1.0, 3, 1),
    ]
    assert [pair.right for pair in [first, *rest, Pair("x", 0, 0.0, 1, 0)]] == [0.0, 1.0, 1.0, 0.0, 0.0, 0.5]


def test_accuracy_counts_pairs_and_resamples_prompts() -> None:
    # one prompt with three right pairs, from three rankings of it; one with one wrong pair
    pairs = [Pair("a", place, 1.0, 1, 0) for place in (4, 5, 6)] + [Pair("b", 7, -1.0, 1, 0)]
    found = accuracy(pairs, seed=1)
    assert found["accuracy"] == 0.75
    assert (found["accuracy_low"], found["accuracy_high"]) == (
        0.0,
        1.0,
    )  # a quarter of the resamples is one prompt alone
    assert accuracy([Pair(str(place), place, 1.0, 1, 0) for place in range(9)], seed=1)["accuracy_low"] == 1.0


def test_slices_by_hand() -> None:
    rows = [ranking([1, 2], ["long enough", "no"]), ranking([1, 3], ["a", "b c d"], "bo", "a much longer prompt")]
    pairs = pairs_of(rows, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])])
    found = {row["slice"]: (row["pairs"], row["accuracy"]) for row in by_slice(pairs, rows, seed=1)}
    assert found == {
        "rank distance: 1": (1, 1.0),
        "rank distance: 2": (1, 0.0),
        "labeler: ada": (1, 1.0),
        "labeler: bo": (1, 0.0),
        "prompt length: short": (1, 1.0),
        "prompt length: long": (1, 0.0),
        "the better one is: longer": (1, 1.0),
        "the better one is: shorter": (1, 0.0),
    }


def test_calibration_by_hand() -> None:
    # two pairs at a confidence of 0.62, one of them right; two at 0.93, both right
    low, high = math.log(0.62 / 0.38), math.log(0.93 / 0.07)
    curve = reliability([Pair("x", 0, margin, 1, 0) for margin in (low, -low, high, high)])
    assert curve == [
        {"pairs": 2, "confidence": pytest.approx(0.62), "accuracy": 0.5},
        {"pairs": 2, "confidence": pytest.approx(0.93), "accuracy": 1.0},
    ]
    assert calibration_error(curve) == pytest.approx((0.12 + 0.07) / 2)


def test_a_model_that_knows_how_sure_it_is_has_no_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(20_000, generator=generator).abs()
    right = torch.rand(20_000, generator=generator) < margins.sigmoid()
    signed = torch.where(right, margins, -margins).tolist()
    assert calibration_error(reliability([Pair("x", 0, margin, 1, 0) for margin in signed])) < 0.01
    doubled = [Pair("x", 0, 3 * margin, 1, 0) for margin in signed]  # it is three times as sure
    assert calibration_error(reliability(doubled)) > 0.08


def test_probes_change_what_they_say() -> None:
    text = "Dear Ann, we are sorry that your kettle came broken."
    made = {name: probe(text) for name, probe in PROBES.items()}
    assert made["empty"] == ""
    assert made["first half"] == "Dear Ann, we are sorry"
    assert sorted(made["words shuffled"].split()) == sorted(text.split())
    assert made["words shuffled"] != text
    assert made["words shuffled"] == PROBES["words shuffled"](text), "the same each time"
    assert made["said twice"].count("kettle") == 2
    assert made["politer"].startswith(text)
    assert len(made["longer"].split()) > len(text.split())


def test_what_probes_do_to_the_score_by_hand() -> None:
    scores = torch.zeros(4, 1 + len(PROBES))
    scores[:, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    scores[:, 1] = scores[:, 0] - 2
    scores[:, 2] = scores[:, 0] + torch.tensor([1.0, -1.0, 1.0, 1.0])
    empty, half, *_ = probed(scores, seed=1)
    assert (empty["probe"], empty["change"], empty["change_high"], empty["raised"]) == ("empty", -2.0, -2.0, 0.0)
    assert (half["change"], half["raised"]) == (0.5, 0.75)
    assert half["change_low"] < 0.5 < half["change_high"]
