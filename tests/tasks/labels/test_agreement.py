"""How far people agree: numbers by hand, and the one who is far from the rest."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tasks.conversations import single
from tasks.datasets import Samples, prompt_id
from tasks.labels import agreement
from tasks.labels.aggregation import places
from tasks.labels.agreement import Agreement, alpha, measure, nobody, page, pair_marks, plain
from tasks.labels.people import join
from tasks.params import load_params
from tasks.rank import queue_of
from tests.judged import ranked

PARAMS = load_params(Path("params.yaml"))


def sample(number: int, outputs: int = 3) -> Samples:
    prompt = single(f"prompt {number}")
    return Samples(id=prompt_id(prompt), prompt=prompt, responses=list("abcdef"[:outputs]), ended=[True] * outputs)


def measured(said: Sequence[Mapping[str, Sequence[int] | None]], more: Any = None) -> Agreement:
    """said: of each item {labeler: ranks}; None is a skip."""
    samples = [sample(number, len(next((r for r in own.values() if r), [1, 2]))) for number, own in enumerate(said)]
    rows = [
        ranked(row, labeler, ranks, **(more or {}).get(labeler, {}))
        for row, own in zip(samples, said, strict=True)
        for labeler, ranks in own.items()
    ]
    return measure(join(queue_of(samples, PARAMS), rows), seed=1)


def row_of(found: Agreement, labeler: str) -> dict[str, Any]:
    (row,) = (row for row in found.labelers if row["labeler"] == labeler)
    return row


def test_pairs_ordered_alike_by_hand() -> None:
    # (a, b) alike, (a, c) alike, (b, c) is a tie of the scores
    assert pair_marks([1, 2, 3], [-1, -2, -2]) == [1, 1, 0.5]
    # (a, c) is no pair that the first ordered
    assert pair_marks([1, 2, 1], [-2, -1, 0]) == [0, 1]


def test_agreement_of_three_labelers_by_hand() -> None:
    """On each of ten items ann and bo say the same, and cy turns the last two round: of three pairs two are alike."""
    found = measured([{"ann": [1, 2, 3], "bo": [1, 2, 3], "cy": [1, 3, 2]}] * 10)
    # six ordered pairs of labelers: two agree in 3 of 3, four in 2 of 3
    assert found.figures["agreement"] == pytest.approx((2 * 3 + 4 * 2) / 18, abs=1e-4)
    assert found.figures["agreement_low"] == found.figures["agreement_high"] == found.figures["agreement"]
    assert row_of(found, "ann")["agreement"] == pytest.approx(5 / 6, abs=1e-4)
    assert row_of(found, "ann")["among_others"] == pytest.approx(2 / 3, abs=1e-4)
    assert row_of(found, "cy")["agreement"] == pytest.approx(2 / 3, abs=1e-4)
    assert row_of(found, "cy")["among_others"] == 1
    assert [row["far"] for row in found.labelers] == [False, False, True]
    # of 3 pairs 3 alike: tau 1; 2 alike and 1 not: (2 - 1) / 3
    assert [(row["labelers"], row["items"], row["tau"]) for row in found.pairs] == [
        (("ann", "bo"), 10, 1.0),
        (("ann", "cy"), 10, pytest.approx(1 / 3, abs=1e-4)),
        (("bo", "cy"), 10, pytest.approx(1 / 3, abs=1e-4)),
    ]


def test_tau_b_with_a_tie_by_hand() -> None:
    """Of three pairs two are alike and one is tied by bo alone: 2 / sqrt(3 * 2). An item tied whole has none."""
    found = measured([{"ann": [1, 2, 3], "bo": [1, 2, 2]}] * 10 + [{"ann": [1, 2, 3], "bo": [1, 1, 1]}])
    assert found.pairs == [{"labelers": ("ann", "bo"), "items": 11, "tau": 0.8165}]


def test_alpha_of_pairs_by_hand() -> None:
    """Two labelers, two outputs, ten items: alike on nine, opposite on one. Each pair both ways round: 20 units and 40
    values, 20 of each. Observed disagreement 4 of 40; by chance 2 * 20 * 20 / 39."""
    found = measured([{"ann": [1, 2], "bo": [1, 2]}] * 9 + [{"ann": [1, 2], "bo": [2, 1]}])
    assert found.figures["alpha"] == pytest.approx(1 - 4 / (2 * 20 * 20 / 39), abs=1e-4)


def test_a_tie_is_half_way() -> None:
    """Against a tie the disagreement is a quarter of that against the opposite: distances are squared."""
    tied = measured([{"ann": [1, 2], "bo": [1, 2]}] * 9 + [{"ann": [1, 2], "bo": [1, 1]}]).figures["alpha"]
    opposite = measured([{"ann": [1, 2], "bo": [1, 2]}] * 9 + [{"ann": [1, 2], "bo": [2, 1]}]).figures["alpha"]
    assert tied is not None
    assert opposite is not None
    assert 1 - tied == pytest.approx((1 - opposite) / 4, rel=0.1)


def test_alpha_of_ratings_leaves_out_what_one_alone_rated() -> None:
    ratings = {"ann": {"ratings": [7, 1, None]}, "bo": {"ratings": [6, 1, 3]}}
    found = measured([{"ann": [1, 2, 3], "bo": [1, 2, 3]}] * 10, ratings)
    # values 7 6 and 1 1 of each item; ordinal, of 20 ones, 10 sixes, 10 sevens: d(6,7) = 10, d(1,6) = 15, d(1,7) = 25;
    # observed 2 * 10 * 10^2, expected 2 * (20 * 10 * 15^2 + 20 * 10 * 25^2 + 10 * 10 * 10^2) / 39
    expected = 2 * (20 * 10 * 15**2 + 20 * 10 * 25**2 + 10 * 10 * 10**2) / 39
    assert found.figures["alpha_ratings"] == pytest.approx(1 - 2 * 10 * 10**2 / expected, abs=1e-4)


def test_alpha_says_nothing_where_all_say_one_thing() -> None:
    assert alpha([[[3, 3]]] * 20) is None
    assert alpha([[[3, 4]]] * 9) is None, "too few"
    assert alpha([[[3, 4]]] * 9 + [[[3]]]) is None, "one value alone is no pair"


def test_of_few_items_no_figure_is_given() -> None:
    found = measured([{"ann": [1, 2, 3], "bo": [3, 2, 1]}] * 9 + [{"ann": [1, 2, 3]}] * 20)
    assert found.figures["shared_items"] == 9
    for name in ("agreement", "alpha", "alpha_ratings"):
        assert found.figures[name] is None
    assert "agreement_low" not in found.figures
    assert "agreement" not in row_of(found, "ann")
    assert found.pairs == [{"labelers": ("ann", "bo"), "items": 9, "tau": None}]
    assert "too few" in text_of(found)


def test_flagged_outputs_count_as_ranked_last() -> None:
    flags = {"ann": {"flags": [["harmful"], [], []]}, "bo": {"flags": [["harmful", "broken"], [], []]}}
    found = measured([{"ann": [1, 2, 3], "bo": [3, 1, 2]}] * 10, flags)
    assert found.figures["agreement"] == 1
    assert found.figures["flagged_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert found.flags == {"harmful": 20, "broken": 10}


def test_time_ties_and_skips_by_labeler() -> None:
    slow = {"bo": {"ended_at": "2026-11-23T09:02:00+01:00"}}
    found = measured([{"ann": [1, 1, 2], "bo": [1, 2, 3], "cy": None}] * 3, slow)
    ann, bo, cy = found.labelers
    assert (ann["median_seconds"], bo["median_seconds"], cy["median_seconds"]) == (30, 120, None)
    assert found.figures["median_seconds"] == 75
    assert (ann["tied_share"], bo["tied_share"], cy["tied_share"]) == (pytest.approx(1 / 3, abs=1e-4), 0, None)
    assert [row["skips"] for row in found.labelers] == [0, 0, 3]
    assert found.skip_reasons == {"not for me": 3}


def drawn(noise: Mapping[str, float], items: int, seed: int) -> Agreement:
    """Each item ranked by three, who see the same worth of four outputs through noise of their own."""
    draw = random.Random(seed)
    return measured(
        [
            {
                name: places([round(place + noise[name] * draw.gauss(0, 1)) for place in range(4)])
                for name in draw.sample(sorted(noise), 3)
            }
            for _ in range(items)
        ]
    )


def test_who_ranks_at_random_is_named_and_nobody_else() -> None:
    found = drawn({"ann": 0.7, "bo": 0.8, "cy": 0.9, "dee": 0.8, "eve": 20.0}, 80, seed=1)
    assert [row["labeler"] for row in found.labelers if row["far"]] == ["eve"]
    assert found.figures["far_labelers"] == 1
    assert "**eve**" in text_of(found)


def test_among_equals_hardly_anybody_is_named() -> None:
    """At most 2.5 % of such runs, if the rule holds; of twenty, one at most."""
    named = [drawn(dict.fromkeys("abcdef", 1.5), 40, seed).figures["far_labelers"] for seed in range(20)]
    assert sum(map(bool, named)) <= 1


def test_the_same_judgments_give_the_same_report() -> None:
    noise = {"ann": 0.7, "bo": 0.8, "cy": 20.0}
    assert text_of(drawn(noise, 30, seed=2)) == text_of(drawn(noise, 30, seed=2))


def text_of(found: Agreement, by_simulated: int = 0) -> str:
    counts = {"judgments": 5, "labelers": 2, "items": 5, "by_people": 5, "by_simulated": by_simulated}
    return page(found, counts)


def test_the_page_says_what_is_simulated() -> None:
    found = measured([{"ann": [1, 2, 3]}])
    assert "None is simulated." in text_of(found)
    assert "**3 of 8 rankings are simulated**" in text_of(found, by_simulated=3)
    assert "Nobody ranked here: rank.labeler is `recorded`." in nobody("recorded")


def test_what_people_wrote_stays_text_on_the_page() -> None:
    assert plain("a|b\n<script>") == r"a\|b \<script\>"
    found = measured([{"ann|<b>x</b>": [1, 2], "bo": [2, 1]}] * 10)
    assert r"ann\|\<b\>x\</b\>" in text_of(found)
    assert "<b>" not in text_of(found).replace(r"\<b\>", "")
    assert len(plain("x" * 1000)) == agreement.LONGEST + 1


def test_prompts_on_which_people_agree_least_come_first() -> None:
    found = measured([{"ann": [1, 2, 3], "bo": [1, 2, 3]}, {"ann": [1, 2, 3], "bo": [3, 2, 1]}])
    assert found.disputed == [(0.0, "prompt 1")]
