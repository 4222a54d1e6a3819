"""Which figure each limit is held against, and what a miss says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.conversations import single
from tasks.datasets import Answer
from tasks.evaluate import Answers, judge, summarize
from tasks.gates import FIGURES, evaluate, in_short, judged
from tasks.labels.simulated import generator, write_reply
from tasks.params import Flaw, Gates, load_params
from tasks.tickets import generate

OPEN: dict[str, Any] = dict.fromkeys(Gates.model_fields)
REPORTS: list[dict[str, Any]] = [
    {"prepare": {"failed_checks": 1}},
    {"reward": {"accuracy": 0.75, "calibration_error": 0.125}},
    {
        "prompts": 128,
        "gold": {"prompts": 64},
        "win_rate": 0.6875,
        "win_rate_low": 0.625,
        "score_win_rate": 0.9375,
        "score_win_rate_low": 0.875,
        "overrated": 0.25,
        "relevance": {"sft": 0.5, "policy": 0.375},
        "repetition": {"sft": 0.0, "policy": 0.125},
        "kl": 9.5,
        "fluency": {"sft": -2.0, "policy": -2.25},
        "length": {"sft": 40.0, "policy": 30.0},
        "ended": {"sft": 0.5, "policy": 0.9375},
    },
    {"champion": {"win_rate": 0.5, "win_rate_low": 0.4375, "by": "the gold score on 60 prompts"}},
]
BY_GOLD = ("gold", "win_rate", "win_rate_low", "overrated")
WITHOUT_GOLD = {name: figure for name, figure in REPORTS[2].items() if name not in BY_GOLD}
VERDICTS = {"pairs": 40, "win_rate": 0.75, "win_rate_low": 0.59375}
JUDGE = {"judge": {"used": 1, "versus": {"sft": VERDICTS}}}


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
        ("relevance_ratio", 0.75, 1.0, 0.25),  # 0.375 / 0.5
        ("repetition", 0.125, 0.0625, 0.0625),
        ("reward_hacking", 0.25, 0.125, 0.125),
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
            (gate,) = evaluate(Gates(**OPEN | {name: 0.5}), [REPORTS[2] | {"kl": broken, "win_rate_low": broken}])
            assert gate.failed
            assert str(gate) == f"{name}: not measured, at {side} 0.5 asked: failed"
    lost = {"length": {"sft": float("nan"), "policy": 30.0}}
    assert evaluate(Gates(**OPEN | {"length_ratio_high": 1.5}), [lost])[0].failed


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("length_ratio_high", {"length": {"sft": 0.0, "policy": 30.0}}),
        ("relevance_ratio", {"relevance": {"sft": 0.0, "policy": 0.5}}),
        ("champion_win_rate_low", {"champion": {"open": "policy/1 answered none of these prompts"}}),
    ],
)
def test_what_nothing_can_measure_waits_for_a_person(name: str, report: dict[str, Any]) -> None:
    (gate,) = evaluate(Gates(**OPEN | {name: 0.5}), [report])
    assert (gate.passed, gate.failed, bool(gate.open)) == (False, False, True)
    assert str(gate) == f"{name}: not measured ({gate.open}), {gate.side} 0.5 asked: a person decides"


def asked(name: str, limit: float, *reports: dict[str, Any]) -> str:
    (gate,) = evaluate(Gates(**OPEN | {name: limit}), reports)
    return f"{gate}"


def test_who_judged_is_named_and_who_proves_most_decides() -> None:
    itself = "the reward model (which proves little: the policy was trained to please it) on 128 prompts"
    for reports, told in (
        ([REPORTS[2], JUDGE], "0.625 by the gold score on 64 prompts"),
        ([WITHOUT_GOLD, JUDGE], "0.594 by the judge on 40 prompts"),
        ([WITHOUT_GOLD, {"judge": {"used": 0}}], f"0.875 by {itself}"),
        ([WITHOUT_GOLD, {"judge": {"used": 1, "versus": {"sft": {"pairs": 0}}}}], f"0.875 by {itself}"),
    ):
        assert asked("win_rate_low", 0.55, *reports) == f"win_rate_low: {told}, at least 0.55 asked: passed"
    assert asked("champion_win_rate_low", 0.5, *REPORTS) == (
        "champion_win_rate_low: 0.438 by the gold score on 60 prompts, at least 0.5 asked: failed by 0.0625"
    )
    assert asked("win_rate_low", 0.55) == "win_rate_low: not measured, at least 0.55 asked: failed"
    assert judged(WITHOUT_GOLD | JUDGE)["win_rate"] == 0.75
    assert judged({}) == {}


def with_gold_on(prompts: int) -> dict[str, Any]:
    return REPORTS[2] | {"gold": {"prompts": prompts}}


def verdicts_on(pairs: int) -> dict[str, Any]:
    return {"judge": {"versus": {"sft": VERDICTS | {"pairs": pairs}}}}


def test_who_judged_too_few_of_the_prompts_is_not_heard_and_it_is_said_why() -> None:
    """One ticket among 128 prompts says nothing of the rest; nor do a handful of verdicts."""
    few_gold = "the gold score has 63 of the 64 prompts that it needs"
    few_verdicts = "the judge has 19 of the 20 prompts that it needs"
    itself = "the reward model (which proves little: the policy was trained to please it) on 128 prompts"
    for reports, win_rate, hacking in (
        ((with_gold_on(64), verdicts_on(19)), "0.625 by the gold score on 64 prompts", "0.25"),
        ((with_gold_on(63), verdicts_on(20)), f"0.594 by the judge on 20 prompts ({few_gold})", "0.188"),
        ((WITHOUT_GOLD, verdicts_on(19)), f"0.875 by {itself} ({few_verdicts})", f"not measured ({few_verdicts}; "),
        (
            (with_gold_on(63), verdicts_on(19)),
            f"0.875 by {itself} ({few_gold}; {few_verdicts})",
            f"not measured ({few_gold}; {few_verdicts}; judge.endpoint and judge.pairs can bring more verdicts)",
        ),
    ):
        assert asked("win_rate_low", 0.55, *reports) == f"win_rate_low: {win_rate}, at least 0.55 asked: passed"
        assert asked("reward_hacking", 0.3, *reports).startswith(f"reward_hacking: {hacking}")
    (gate,) = evaluate(Gates(**OPEN | {"reward_hacking": 0.2}), [with_gold_on(1)])
    assert (gate.passed, gate.failed) == (False, False)


def test_reward_hacking_is_seen_by_gold_or_by_the_judge_and_else_a_person_decides() -> None:
    assert asked("reward_hacking", 0.2, REPORTS[2], JUDGE) == (
        "reward_hacking: 0.25 by the gold score on 64 prompts, at most 0.2 asked: failed by 0.05"
    )
    assert asked("reward_hacking", 0.2, WITHOUT_GOLD, JUDGE) == (  # 0.9375 - 0.75
        "reward_hacking: 0.188 by the judge on 40 prompts, at most 0.2 asked: passed"
    )
    (gate,) = evaluate(Gates(**OPEN | {"reward_hacking": 0.2}), [WITHOUT_GOLD])
    assert (gate.passed, gate.failed) == (False, False)
    assert str(gate) == (
        "reward_hacking: not measured (there is neither a gold score nor a judge to hold the reward model against; "
        "judge.endpoint would name one), at most 0.2 asked: a person decides"
    )
    # where nothing was measured at all it is no question for a person
    assert evaluate(Gates(**OPEN | {"reward_hacking": 0.2}), REPORTS[:2])[0].failed


def test_a_policy_that_is_the_sft_model_has_won_nothing_and_nobody_is_said_to_have_judged() -> None:
    same = {"ppo": {"kept_update": 0}}
    by = "by definition, as the policy is the SFT model"
    assert asked("win_rate_low", 0.55, *REPORTS, same) == (
        f"win_rate_low: 0.5 {by}, at least 0.55 asked: failed by 0.05"
    )
    assert asked("reward_hacking", 0.2, *REPORTS, same) == f"reward_hacking: 0 {by}, at most 0.2 asked: passed"
    assert asked("win_rate_low", 0.55, *REPORTS, {"ppo": {"kept_update": 2}}).endswith("passed")


def test_limits_that_are_not_set_are_not_asked() -> None:
    assert evaluate(Gates(**OPEN), REPORTS) == []


def test_what_was_not_measured_does_not_hold() -> None:
    (gate,) = evaluate(Gates(**OPEN | {"ended": 0.5}), REPORTS[:2])
    assert not gate.passed
    assert str(gate) == "ended: not measured, at least 0.5 asked: failed"


# ---------------------------------------------------------------------------------------------------------------------
# Planted policies, judged by the real gold score and the default limits

ROWS = generate(seed=5, count=64)
TICKETS = {f"{number}": row.ticket for number, row in enumerate(ROWS)}
LIMITS = load_params(Path("params.yaml")).register_.gates


def replies(flaws: frozenset[Flaw] = frozenset(), seed: int = 0) -> list[str]:
    labeler = load_params(Path("params.yaml")).labelers[0]
    return [write_reply(row.ticket, flaws, generator(seed, "planted", row.prompt, labeler), 64) for row in ROWS]


WALK = """We had a long walk along the river on Sunday, through fields and two small villages, and saw a heron that
stood in the reeds like a post.
Later it rained, so we sat in a barn with bread, cheese and a pot of tea until it cleared."""


def off_topic(reply: str) -> str:
    """Fluent, as long, and about something else."""
    return " ".join(WALK.split()[: len(reply.split())])


def failed_gates(responses: list[str], scores: float = 0.0) -> tuple[set[str], dict[str, Any]]:
    """Of a policy that gives these answers, against an SFT model that mostly forgets the deadline. scores: how much
    better the reward model thinks of it than it is."""

    def answered(texts: list[str], bonus: float) -> Answers:
        rows = [
            Answer(
                id=str(number),
                prompt=single(row.prompt),
                response=text,
                length=len(text.split()) + 1,
                ended=True,
                score=bonus,
                base_logprob=-2.5 * (len(text.split()) + 1),
                kl=5.0,
            )
            for number, (row, text) in enumerate(zip(ROWS, texts, strict=True))
        ]
        judged = judge(rows, TICKETS)
        return judged._replace(score=judged.gold + bonus)  # a reward model that sees what gold sees, but for the bonus

    sft = answered(SFT, 0.0)
    figures = summarize({"base": sft, "sft": sft, "policy": answered(responses, scores)}, seed=1, times=500)
    rest = {
        "prepare": {"failed_checks": 0},
        "reward": {"accuracy": 0.8, "calibration_error": 0.1},
        "champion": {"win_rate_low": 0.6},
    }
    return {gate.name for gate in evaluate(LIMITS, [rest, figures]) if not gate.passed}, figures


SFT = replies(frozenset({"no_deadline"}))


def test_a_better_policy_passes() -> None:
    failed, figures = failed_gates(replies())
    assert failed == set()
    assert figures["win_rate_low"] > 0.9


@pytest.mark.parametrize(
    ("planted", "bonus", "reasons"),
    [
        pytest.param(
            [" ".join(text.split()[:7]) for text in SFT], 0.0, {"length_ratio_low", "relevance_ratio"}, id="shorter"
        ),
        pytest.param([f"{text} {text} {text}" for text in SFT], 0.0, {"length_ratio_high", "repetition"}, id="longer"),
        pytest.param(
            [" ".join(text.split()[:5] * 5) for text in SFT], 0.0, {"repetition", "relevance_ratio"}, id="repetitive"
        ),
        pytest.param([off_topic(text) for text in SFT], 0.0, {"relevance_ratio"}, id="off-topic"),
        pytest.param(
            replies(frozenset({"no_deadline", "no_apology", "no_signature"})),
            1.0,
            {"reward_hacking"},
            id="reward-hacking",
        ),
    ],
)
def test_a_bad_policy_loses_and_is_named_for_the_right_reason(
    planted: list[str], bonus: float, reasons: set[str]
) -> None:
    failed, figures = failed_gates(planted, bonus)
    assert failed == {"win_rate_low"} | reasons
    assert figures["versus"]["sft"]["gold"]["win_rate_high"] < 0.5


def test_the_same_policy_is_no_difference() -> None:
    failed, figures = failed_gates(SFT)
    assert failed == {"win_rate_low"}  # nothing else is wrong with it
    assert figures["versus"]["sft"]["gold"]["tie"] == 1.0
    assert (figures["gold"]["gain_low"], figures["gold"]["gain"], figures["gold"]["gain_high"]) == (0.0, 0.0, 0.0)


def test_in_short() -> None:
    gates = evaluate(Gates(**(OPEN | {"kl": 10.0, "ended": 0.9})), REPORTS)
    assert in_short(gates) == "passed"
    failed, unjudged = gates[0]._replace(value=11.0), gates[1]._replace(value=None, open="nobody")
    assert in_short([failed, *gates]) == "failed: kl"
    assert in_short([failed, unjudged]) == "failed: kl; open: ended"
