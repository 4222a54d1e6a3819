"""The visible checks, on replies judged by hand."""

from __future__ import annotations

import pytest

from tasks.datasets import Ticket
from tasks.labels import checks

TICKET = Ticket(
    kind="broken",
    customer="Maria",
    order="4821",
    item="water bottle",
    problem="arrived broken",
    remedy="a full refund",
    deadline="14 March",
    signer="Tom",
)
GOOD = (
    "Hi Maria,\nSorry that the water bottle in order 4821 arrived broken. You will get a full refund by 14 March.\n"
    "Best, Tom"
)


def with_remedy(remedy: str) -> Ticket:
    return TICKET.model_copy(update={"remedy": remedy})


def with_deadline(deadline: str) -> Ticket:
    return TICKET.model_copy(update={"deadline": deadline})


def test_a_good_reply_passes_every_check() -> None:
    assert checks.run_checks(GOOD, TICKET) == dict.fromkeys(checks.CHECKS, 1.0)


def test_an_empty_reply_passes_none() -> None:
    assert checks.run_checks("", TICKET) == dict.fromkeys(checks.CHECKS, 0.0)
    assert checks.run_checks(" \n ", TICKET) == dict.fromkeys(checks.CHECKS, 0.0)


@pytest.mark.parametrize(
    ("change", "into", "fails"),
    [
        ("Hi Maria,", "Hello,", {"name"}),
        ("Hi Maria,", "Hi Marian,", {"name", "invention"}),
        (" in order 4821", "", {"order"}),
        ("4821", "48210", {"order", "invention"}),
        ("Sorry that the", "We read that the", {"apology"}),
        ("Best, Tom", "We apologize again.\nBest, Tom", {"apology"}),
        ("a full refund", "a replacement", {"remedy"}),
        ("a full refund", "a full refund or store credit", {"remedy"}),
        ("by 14 March", "soon", {"deadline"}),
        ("14 March", "15 March", {"deadline", "invention"}),
        ("by 14 March", "by 14 March, not Friday", {"invention"}),
        ("Best, Tom", "Best regards", {"signature"}),
        ("Best, Tom", "Best, Jane", {"signature", "invention"}),
        ("Best, Tom", "Best, [Your Name]", {"signature", "invention"}),
        ("Best, Tom", "Write to help@shop.com. Best, Tom", {"invention"}),
        ("Best, Tom", "We guarantee it. Best, Tom", {"invention"}),
        ("Best, Tom", "You get $5 too. Best, Tom", {"invention"}),
        ("Best, Tom", "Our agent Walter knows. Best, Tom", {"invention"}),
    ],
)
def test_one_change_fails_its_own_checks_and_no_other(change: str, into: str, fails: set[str]) -> None:
    assert change in GOOD
    marks = checks.run_checks(GOOD.replace(change, into), TICKET)
    assert {name for name, mark in marks.items() if mark < 1} == fails


def test_the_name_must_stand_at_the_beginning_and_the_signature_at_the_end() -> None:
    assert checks.greets_by_name("Thank you for your message, Maria.", TICKET) == 1.0  # sixth word
    assert checks.greets_by_name("Thank you very much for your message, Maria.", TICKET) == 0.0  # eighth word
    assert checks.is_signed("Yours, Tom at the shop", TICKET) == 1.0  # fourth from the end
    assert checks.is_signed("I am Tom and I will help you", TICKET) == 0.0


def test_half_a_mark_for_half_the_item() -> None:
    assert checks.names_item("the Water Bottle broke", TICKET) == 1.0
    assert checks.names_item("the bottle broke", TICKET) == 0.5
    assert checks.names_item("the bottleneck", TICKET) == 0.0


@pytest.mark.parametrize(
    ("apology", "mark"),
    [
        ("We are sorry.", 1.0),
        ("Our apologies!", 1.0),
        ("We apologise.", 1.0),
        ("We regret this.", 1.0),
        ("Best regards", 0.0),
        ("Sorry, so sorry.", 0.0),
        ("I am sorry and I apologize.", 0.0),
    ],
)
def test_one_apology(apology: str, mark: float) -> None:
    assert checks.apologizes_once(apology, TICKET) == mark


@pytest.mark.parametrize(
    ("text", "remedies"),
    [
        ("We will refund you in full.", {"full refund"}),
        ("You get your money back.", {"full refund"}),
        ("You get a partial refund.", {"partial refund"}),
        ("We refund you in part.", {"partial refund"}),
        ("A partial refund or a full refund?", {"partial refund", "full refund"}),
        ("We will replace it.", {"replacement"}),
        ("We send you a new water bottle.", {"replacement"}),
        ("Expect a new delivery.", {"new delivery"}),
        ("We will resend it.", {"new delivery"}),
        ("You get 20% off.", {"20% discount"}),
        ("You get a discount of 20 percent.", {"20% discount"}),
        ("20% off; the discount is yours.", {"20% discount"}),
        ("You get a discount.", {"discount"}),
        ("A spare part is on its way.", {"spare part"}),
        ("A replacement part is on its way.", {"spare part"}),
        ("We put store credit on your account.", {"store credit"}),
        ("We refund it to your credit card.", {"full refund"}),
        ("Here is a gift card.", {"gift card"}),
        ("We recommend patience.", set()),
        ("We cannot offer a refund.", set()),
        ("We can't give you a refund.", set()),
        ("You get store credit instead of a refund.", {"store credit"}),
        ("It did not arrive. A refund is due.", {"full refund"}),
    ],
)
def test_remedies_are_read_in_many_wordings(text: str, remedies: set[str]) -> None:
    assert checks.remedies_in(text, TICKET) == remedies


def test_a_discount_must_be_the_right_one() -> None:
    ticket = with_remedy("a 20% discount")
    assert checks.offers_remedy("You get 20% off.", ticket) == 1.0
    assert checks.offers_remedy("You get a discount.", ticket) == 0.0
    assert checks.offers_remedy("You get 10% off.", ticket) == 0.0


def test_words_of_item_and_problem_are_no_remedies() -> None:
    ticket = TICKET.model_copy(update={"item": "gift card holder", "problem": "was not repaired"})
    assert checks.remedies_in("The gift card holder was not repaired.", ticket) == set()


def test_a_remedy_of_a_teams_own() -> None:
    ticket = with_remedy("a tour of the factory")
    assert checks.offers_remedy("You get a tour of the factory.", ticket) == 1.0
    assert checks.offers_remedy("You get a tour of the factory or a refund.", ticket) == 0.0
    assert checks.offers_remedy("You get a tour.", ticket) == 0.0


@pytest.mark.parametrize(
    ("deadline", "text", "mark"),
    [
        ("14 March", "by March 14", 1.0),
        ("14 March", "by the 14th of March", 1.0),
        ("March 14", "before Mar 14", 1.0),
        ("14 March", "by 1 March", 0.0),
        ("4 March", "by 14 March", 0.0),
        ("14 March", "on 14 May", 0.0),
        ("Friday", "until friday", 1.0),
        ("Friday", "until Thursday", 0.0),
        ("noon", "until noon", 1.0),
    ],
)
def test_deadlines_are_read_in_many_wordings(deadline: str, text: str, mark: float) -> None:
    assert checks.states_deadline(text, with_deadline(deadline)) == mark


def test_an_abbreviated_date_is_not_an_invented_name() -> None:
    assert checks.invents_nothing("It comes by Mar 14 at the latest.", TICKET) == 1.0


@pytest.mark.parametrize(("words", "mark"), [(4, 0.0), (9, 0.5), (14, 1.0), (37, 1.0), (44, 0.0), (60, 0.0)])
def test_length(words: int, mark: float) -> None:
    assert checks.fits_length("word " * words, TICKET) == mark


def test_length_falls_in_a_line() -> None:
    assert checks.fits_length("word " * 40, TICKET) == pytest.approx(4 / 7)
