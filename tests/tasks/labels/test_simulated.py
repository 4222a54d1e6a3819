"""Simulated labelers: wordings, flaws, utilities and the noise of their rankings."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean

import pytest

from tasks.datasets import Ticket
from tasks.labels.checks import run_checks
from tasks.labels.simulated import (
    BREAKS,
    CARELESS_RATES,
    EXCLUDED_BY,
    check_weights,
    choose_labeler,
    demonstrate,
    draw_flaws,
    generator,
    rank,
    token_bound,
    utility,
    write_reply,
)
from tasks.params import Flaw, Labeler, load_params
from tasks.tickets import generate

MAX_TOKENS = 63
TICKETS = [row.ticket for row in generate(seed=3, count=400)]
LABELERS = load_params(Path("params.yaml")).labelers


def labeler(**changes: object) -> Labeler:
    plain = {"id": "x", "skill": 0.5, "temperature": 0.1, "just_noticeable": 0.0, "habits": {}}
    return Labeler.model_validate({**plain, **changes})


def test_a_reply_without_flaws_passes_every_check() -> None:
    for number, ticket in enumerate(TICKETS):
        reply = write_reply(ticket, frozenset(), random.Random(number), MAX_TOKENS)
        assert run_checks(reply, ticket) == dict.fromkeys(run_checks(reply, ticket), 1.0), reply


@pytest.mark.parametrize("flaw", CARELESS_RATES)
def test_each_flaw_breaks_its_check_and_no_other(flaw: Flaw) -> None:
    # a wrong date is an invented one as well
    allowed = {BREAKS[flaw]} | ({"invention"} if flaw == "wrong_deadline" else set())
    broken = Counter[str]()
    for number, ticket in enumerate(TICKETS):
        reply = write_reply(ticket, frozenset({flaw}), random.Random(number), MAX_TOKENS)
        failed = {name for name, mark in run_checks(reply, ticket).items() if mark < 1}
        assert failed <= allowed, reply
        broken.update(failed)
    # a reply with little room left may be padded too little to be too long
    assert broken[BREAKS[flaw]] >= (0.9 if flaw == "padding" else 1.0) * len(TICKETS)


def test_every_flaw_has_its_check() -> None:
    assert BREAKS.keys() == CARELESS_RATES.keys()
    assert set(BREAKS.values()) == set(run_checks("", TICKETS[0]))


def test_replies_stay_within_the_tokens() -> None:
    """By the bound. By SmolLM2's own tokenizer the longest of 96,000 (four seeds, each labeler) has 62 tokens."""
    for number, ticket in enumerate(TICKETS):
        reply, _ = demonstrate(ticket, LABELERS[number % len(LABELERS)], random.Random(number), MAX_TOKENS)
        assert token_bound(reply) <= MAX_TOKENS
        assert len(reply.split()) <= 55


def test_token_bound_by_hand() -> None:
    # Hi Ann , \n order 4 8 2 . = 9 pieces, 1 before the number, 7 in reserve
    assert token_bound("Hi Ann,\norder 482.") == 17


def test_a_ticket_too_long_for_the_limit_gets_a_short_reply_rather_than_none() -> None:
    ticket = TICKETS[0].model_copy(update={"item": "very " * 60 + "long item"})
    reply = write_reply(ticket, frozenset(), random.Random(0), MAX_TOKENS)
    assert ticket.item in reply


def test_wordings_are_many() -> None:
    replies = {write_reply(TICKETS[0], frozenset(), random.Random(number), MAX_TOKENS) for number in range(1000)}
    assert len(replies) > 950


def test_skill_is_the_share_without_flaws() -> None:
    assert draw_flaws(labeler(skill=1.0), random.Random(0)) == frozenset()
    careless = [draw_flaws(labeler(skill=0.0), random.Random(number)) for number in range(2000)]
    # the rates are those of the table, of the second of a pair those where the first is not
    for flaw, rate in CARELESS_RATES.items():
        expected = rate * (1 - CARELESS_RATES[EXCLUDED_BY[flaw]] if flaw in EXCLUDED_BY else 1)
        assert mean(flaw in flaws for flaws in careless) == pytest.approx(expected, abs=0.035)
    half = [draw_flaws(labeler(skill=0.5), random.Random(f"half {number}")) for number in range(2000)]
    none_by_chance = math.prod(1 - rate for flaw, rate in CARELESS_RATES.items() if flaw not in EXCLUDED_BY)
    assert mean(not flaws for flaws in half) == pytest.approx(0.5 + 0.5 * none_by_chance, abs=0.035)


def test_habits_change_the_rates() -> None:
    always = labeler(skill=0.0, habits={"no_order": 2.0, "no_signature": 0.0})  # 0.55 * 2 > 1
    for number in range(200):
        flaws = draw_flaws(always, random.Random(number))
        assert "no_order" in flaws
        assert "no_signature" not in flaws


def test_default_labelers_leave_room_to_learn() -> None:
    """About 60 of 100 demonstrations are flawed, and their mean gold score without fluency is about 0.75."""
    scores, flawed = [], []
    for number, ticket in enumerate(TICKETS):
        reply, flaws = demonstrate(ticket, LABELERS[number % len(LABELERS)], random.Random(number), MAX_TOKENS)
        scores.append(mean(run_checks(reply, ticket).values()))
        flawed.append(bool(flaws))
    assert 0.70 < mean(scores) < 0.80
    assert 0.55 < mean(flawed) < 0.70


def test_what_a_labeler_is_careless_about_weighs_less() -> None:
    weights = check_weights(labeler(habits={"no_order": 3.0, "no_signature": 0.0, "two_apologies": 1.5}))
    assert weights.pop("order") == pytest.approx(0.5)  # 2 / (1 + 3)
    assert weights.pop("signature") == pytest.approx(2.0)  # 2 / (1 + 0)
    assert weights.pop("apology") == pytest.approx(0.8)  # 2 / (1 + 1.5)
    assert set(weights.values()) == {1.0}


def test_utility_by_hand() -> None:
    ticket = Ticket(
        kind="late",
        customer="Ben",
        order="77",
        item="lamp",
        problem="arrived late",
        remedy="store credit",
        deadline="Friday",
        signer="Sue",
    )
    reply = "Dear Ben,\nSorry that the lamp arrived late. You will get store credit by Friday.\nYours, Sue"  # no order
    assert utility(reply, ticket, labeler()) == pytest.approx(8 / 9)
    assert utility(reply, ticket, labeler(), ended=False) == pytest.approx(8 / 9 - 0.3)
    # the order weighs 0.5 of 8.5 in all
    assert utility(reply, ticket, labeler(habits={"no_order": 3.0})) == pytest.approx(8 / 8.5)


def test_without_noise_the_order_is_that_of_the_utilities() -> None:
    assert rank([0.2, 0.9, 0.5, 0.7], labeler(temperature=0.0), random.Random(0)) == [4, 1, 3, 2]


def test_ties_share_a_rank() -> None:
    assert rank([0.5, 0.9, 0.5, 0.1], labeler(temperature=0.0), random.Random(0)) == [2, 1, 2, 4]


def test_equal_utilities_tie_whatever_the_noise() -> None:
    for number in range(100):
        ranks = rank([0.4, 0.8, 0.4, 0.4], labeler(temperature=5.0), random.Random(number))
        assert ranks[0] == ranks[2] == ranks[3] != ranks[1]


def test_just_noticeable_differences() -> None:
    person = labeler(temperature=0.0, just_noticeable=0.1)
    # 0.92 is seen as the best, 0.90; 0.81 is 0.11 below the best and starts a group that 0.75 joins
    assert rank([0.90, 0.81, 0.92, 0.75], person, random.Random(0)) == [1, 3, 1, 3]
    # the difference must be less: exactly representable 0.25 apart is noticed
    assert rank([0.75, 0.5], labeler(temperature=0.0, just_noticeable=0.25), random.Random(0)) == [1, 2]


def test_pairs_follow_bradley_terry() -> None:
    """P(a before b) = 1 / (1 + exp(-(u_a - u_b) / T)), within 4 standard errors."""
    utilities, temperature, draws = [0.9, 0.8, 0.6], 0.2, 4000
    rng = random.Random(11)
    rankings = [rank(utilities, labeler(temperature=temperature), rng) for _ in range(draws)]
    for a, b in combinations(range(3), 2):
        expected = 1 / (1 + math.exp(-(utilities[a] - utilities[b]) / temperature))
        found = mean(ranks[a] < ranks[b] for ranks in rankings)
        assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / draws))


def test_longer_rankings_follow_plackett() -> None:
    """The first place goes by softmax(u / T)."""
    utilities, temperature, draws = [0.9, 0.8, 0.6, 0.6 - 1e-9], 0.2, 4000
    rng = random.Random(12)
    first = Counter(rank(utilities, labeler(temperature=temperature), rng).index(1) for _ in range(draws))
    odds = [math.exp(u / temperature) for u in utilities]
    for place, odd in enumerate(odds):
        expected = odd / sum(odds)
        assert first[place] / draws == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / draws))


def test_labelers_share_the_work_and_stay_with_their_prompts() -> None:
    chosen = {str(number): choose_labeler(LABELERS, 1, "rank", str(number)).id for number in range(2000)}
    counts = Counter(chosen.values())
    assert all(counts[person.id] == pytest.approx(2000 / len(LABELERS), rel=0.15) for person in LABELERS)
    assert chosen["17"] == choose_labeler(LABELERS, 1, "rank", "17").id
    assert [choose_labeler(LABELERS, 1, "demonstrate", key).id for key in chosen] != list(chosen.values())


def test_draws_depend_on_seed_job_prompt_and_labeler() -> None:
    streams = [
        generator(1, "rank", "a", LABELERS[0]),
        generator(2, "rank", "a", LABELERS[0]),
        generator(1, "demonstrate", "a", LABELERS[0]),
        generator(1, "rank", "b", LABELERS[0]),
        generator(1, "rank", "a", LABELERS[1]),
    ]
    first = [stream.random() for stream in streams]
    assert len(set(first)) == len(first)
    assert generator(1, "rank", "a", LABELERS[0]).random() == first[0]
    assert all(a != b for a, b in pairwise(first))
