"""The gold score: its arithmetic, and that nothing which trains can reach it."""

from __future__ import annotations

import pytest

from tasks.datasets import Ticket
from tasks.labels.gold import WEIGHTS, fluency, gold_parts, gold_score
from tasks.lineage import load_stages
from tests.imports import ROOT, code_of

STAGES = load_stages(ROOT)
TRAINING = ("sft", "sample", "reward", "ppo")
GOLD, CHECKS, SIMULATED = (f"tasks/labels/{name}.py" for name in ("gold", "checks", "simulated"))

TICKET = Ticket(
    kind="late",
    customer="Ben",
    order="77",
    item="lamp",
    problem="arrived late",
    remedy="store credit",
    deadline="Friday",
    signer="Sue",
)
GOOD = (
    "Dear Ben,\nWe are sorry that the lamp in order 77 arrived late. You will get store credit by Friday.\nYours, Sue"
)


def test_weights_add_up_to_one() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1.0, abs=1e-12)
    assert len(WEIGHTS) == 10


@pytest.mark.parametrize(("logprob", "mark"), [(-9.0, 0.0), (-5.0, 0.0), (-3.5, 0.5), (-2.0, 1.0), (-0.1, 1.0)])
def test_fluency_is_a_clipped_line(logprob: float, mark: float) -> None:
    assert fluency(logprob) == pytest.approx(mark, abs=1e-12)


def test_gold_score_by_hand() -> None:
    assert gold_score(GOOD, TICKET, mean_logprob=-2.0) == pytest.approx(1.0)
    assert gold_score(GOOD, TICKET, mean_logprob=-3.5) == pytest.approx(0.95)  # half the fluency
    # no order number, another weekday (which is also invented): three checks of 0.1 each
    worse = GOOD.replace(" in order 77", "").replace("Friday", "Monday")
    assert gold_score(worse, TICKET, mean_logprob=-5.0) == pytest.approx(0.6)
    assert gold_score("", TICKET, mean_logprob=-5.0) == 0.0


def test_parts_and_weights_have_the_same_names() -> None:
    assert gold_parts(GOOD, TICKET, -2.0).keys() == WEIGHTS.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_only_evaluate_imports_or_declares_the_gold_score(stage: str) -> None:
    assert (GOLD in code_of(stage)) == (stage == "evaluate")
    assert (GOLD in STAGES[stage].deps) == (stage == "evaluate")


@pytest.mark.parametrize("stage", TRAINING)
def test_training_reaches_neither_checks_nor_facts(stage: str) -> None:
    reached = code_of(stage)
    assert not {GOLD, CHECKS, SIMULATED} & reached
    assert not [file for file in reached if "facts.jsonl" in (ROOT / file).read_text(encoding="utf-8")]
    hidden = ("tasks/labels", "data/raw", "data/prepared/facts.jsonl")
    deps = STAGES[stage].deps
    assert not [dep for dep in deps if dep.startswith(hidden) or dep in ("data", "data/prepared", "tasks")]


def test_the_walk_sees_what_is_there() -> None:
    """A walk that found nothing would prove nothing."""
    assert {GOLD, CHECKS} <= code_of("evaluate")
    assert {CHECKS, SIMULATED} <= code_of("rank")
