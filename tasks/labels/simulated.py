"""Simulated labelers: people of different skill and habits who answer tickets and rank replies, with known noise.

Demonstrating: with probability `skill` a labeler writes with care, without flaws. Otherwise each flaw slips in with its
usual rate (CARELESS_RATES) times the labeler's habit for it. A reply is put together from openings, apologies, remedy
and deadline phrases and closings, in two orders: over 10^4 wordings for one ticket.

Ranking: a labeler's opinion of a reply, its utility, is the weighted mean of the visible checks in
tasks/labels/checks.py, in [0, 1]; a check weighs less the more careless the labeler is about it.
Replies whose utilities lie within `just_noticeable` of each other are ties, and the rest are ordered with noise so that
P(i before j) = 1 / (1 + exp(-(u_i - u_j) / temperature)): Bradley and Terry (1952), for whole rankings Plackett (1975),
drawn by adding Gumbel noise to u / temperature and sorting.

Every draw comes from a generator named by (seed, prompt, labeler), so a sub-set gets the labels that the whole gets.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from itertools import accumulate

from tasks.datasets import Ticket, stable_share
from tasks.labels.checks import FIT_WORDS, run_checks
from tasks.params import Flaw, Labeler

# How often each flaw slips into a demonstration written without care.
CARELESS_RATES: dict[Flaw, float] = {
    "no_name": 0.35,
    "no_order": 0.55,
    "no_item": 0.4,
    "no_apology": 0.3,
    "two_apologies": 0.25,
    "other_remedy": 0.25,
    "no_deadline": 0.35,
    "wrong_deadline": 0.15,
    "no_signature": 0.45,
    "padding": 0.4,
    "empty_promise": 0.2,
}
EXCLUDED_BY: dict[Flaw, Flaw] = {"two_apologies": "no_apology", "wrong_deadline": "no_deadline"}

# The check of tasks/labels/checks.py that a flaw breaks.
BREAKS: dict[Flaw, str] = {
    "no_name": "name",
    "no_order": "order",
    "no_item": "item",
    "no_apology": "apology",
    "two_apologies": "apology",
    "other_remedy": "remedy",
    "no_deadline": "deadline",
    "wrong_deadline": "deadline",
    "no_signature": "signature",
    "padding": "length",
    "empty_promise": "invention",
}

UNENDED_COST = 0.3  # of utility, for a reply that was cut off before its end

GREETINGS = ("Hi {customer},", "Dear {customer},", "Hello {customer},", "Hello {customer}!", "Good day {customer},")
NAMELESS_GREETINGS = ("Hi,", "Hello,", "Dear customer,", "Good day,")

# Where the order number stands: {thing} is the item, or words for it.
FACTS = (
    "the {thing} in order {order} {problem}", "the {thing} from order {order} {problem}",
    "your {thing} (order {order}) {problem}", "the {thing} {problem} (order {order})",
)  # fmt: skip
ORDERLESS_FACTS = ("your {thing} {problem}", "the {thing} {problem}")
THINGS = ("purchase", "product")  # for the item, where a labeler does not name it

APOLOGIES = (
    "Sorry that {fact}.", "We are sorry that {fact}.", "I am sorry that {fact}.", "We apologize that {fact}.",
    "Our apologies that {fact}.", "We read that {fact}. Sorry about that!",
)  # fmt: skip
UNAPOLOGETIC = ("We see that {fact}.", "You wrote that {fact}.", "We read that {fact}.")
SECOND_APOLOGIES = ("Again, sorry!", "Once more, we apologize.", "We are so sorry.")

OFFERS = (
    "You will get {remedy} {by}.", "We offer you {remedy} {by}.", "We will arrange {remedy} {by}.",
    "You can expect {remedy} {by}.", "{by} you will have {remedy}.", "{remedy} will be yours {by}.",
)  # fmt: skip
BYS = ("by {deadline}", "no later than {deadline}")
SOONS = ("soon", "in due time", "as soon as we can")
OTHER_REMEDIES = (
    "a full refund", "a replacement", "store credit", "a free repair", "an exchange", "a partial refund", "a gift card",
    "a new delivery",
)  # fmt: skip
OTHER_DEADLINES = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

PROMISES = ("We guarantee it.", "A free gift is on its way too.", "You also get a bonus.")
PADDING = (
    "we care a lot about all of you", "we think of you day and night", "we are here for you at all times",
    "we hope to see you here again soon", "we do all that we can do", "you are at the heart of our work",
    "we mean all that we say here", "we love what we do for you", "all of us read what you wrote",
)  # fmt: skip
PADDED_WORDS = 44  # at which a padded reply is long enough to be too long
PADDING_TOKENS = 21  # that the rest of a padded reply leaves free
MAX_DRAFTS = 200

CLOSINGS = (
    "Best, {signer}", "Kind regards, {signer}", "Regards, {signer}", "Yours, {signer}", "Best wishes, {signer}",
    "Kind regards,\n{signer}",
)  # fmt: skip
UNSIGNED_CLOSINGS = ("Best regards", "Kind regards", "Thank you")


def choose_labeler(labelers: Sequence[Labeler], seed: int, job: str, prompt_id: str) -> Labeler:
    """Who does a job for a prompt: everyone gets about the same number, and it does not depend on the other prompts."""
    return labelers[int(stable_share(seed, job, prompt_id) * len(labelers))]


def generator(seed: int, job: str, prompt_id: str, labeler: Labeler) -> random.Random:
    return random.Random(f"{seed}|{job}|{prompt_id}|{labeler.id}")


def demonstrate(ticket: Ticket, labeler: Labeler, rng: random.Random, max_tokens: int) -> tuple[str, frozenset[Flaw]]:
    """A labeler's reply to a ticket, of at most `max_tokens` tokens, and the flaws in it."""
    flaws = draw_flaws(labeler, rng)
    return write_reply(ticket, flaws, rng, max_tokens), flaws


def draw_flaws(labeler: Labeler, rng: random.Random) -> frozenset[Flaw]:
    if rng.random() < labeler.skill:
        return frozenset()
    flaws: set[Flaw] = set()
    for flaw, rate in CARELESS_RATES.items():
        if rng.random() < rate * labeler.habits.get(flaw, 1.0) and EXCLUDED_BY.get(flaw) not in flaws:
            flaws.add(flaw)
    return frozenset(flaws)


def write_reply(ticket: Ticket, flaws: frozenset[Flaw], rng: random.Random, max_tokens: int) -> str:
    """A reply with these flaws and at most `max_tokens` tokens, by `token_bound`.

    Wordings are drawn until one fits, in words too. Where none of many does (a team's own ticket of many words), it is
    the shortest.
    """
    room = max_tokens - (PADDING_TOKENS if "padding" in flaws else 0)

    def too_long(parts: list[str]) -> bool:
        text = "\n".join(parts)
        return token_bound(text) > room or len(text.split()) > FIT_WORDS[2]

    drafts = [_draft(ticket, flaws, rng)]
    while too_long(drafts[-1]) and len(drafts) < MAX_DRAFTS:
        drafts.append(_draft(ticket, flaws, rng))
    fitting = drafts[-1] if not too_long(drafts[-1]) else min(drafts, key=lambda parts: token_bound("\n".join(parts)))
    greeting, *body, closing = fitting
    breaks = rng.choice(("\n", " "))

    def join(body: list[str]) -> str:
        return breaks.join(part for part in (greeting, " ".join(body), closing) if part)

    if "padding" in flaws:
        body = _pad(body, join, max_tokens, rng)
    return join(body)


def token_bound(text: str) -> int:
    """At least as many as SmolLM2's tokens in a reply to an embedded ticket, without the tokenizer: each word, digit,
    sign and line break is a token, a number has one more before it, and seven are for words of several tokens."""
    return len(_PIECES.findall(text)) + len(_NUMBERS.findall(text)) + 7


_PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]|\n")
_NUMBERS = re.compile(r"\d+")


def _draft(ticket: Ticket, flaws: frozenset[Flaw], rng: random.Random) -> list[str]:
    """Greeting, sentences, closing; without padding."""
    facts = ticket.model_dump()
    greeting = rng.choice(NAMELESS_GREETINGS if "no_name" in flaws else GREETINGS)
    thing = rng.choice(THINGS) if "no_item" in flaws else ticket.item
    fact = rng.choice(ORDERLESS_FACTS if "no_order" in flaws else FACTS).format(thing=thing, **facts)
    complaint = rng.choice(UNAPOLOGETIC if "no_apology" in flaws else APOLOGIES).format(fact=fact)
    offer = _offer(ticket, flaws, rng)
    body = [complaint, offer] if rng.random() < 0.7 else [offer, complaint]
    if "empty_promise" in flaws:
        body.append(rng.choice(PROMISES))
    if "two_apologies" in flaws:
        body.append(rng.choice(SECOND_APOLOGIES))
    closing = rng.choice(UNSIGNED_CLOSINGS if "no_signature" in flaws else CLOSINGS)
    return [greeting.format(**facts), *body, closing.format(**facts)]


def _pad(body: list[str], join: Callable[[list[str]], str], max_tokens: int, rng: random.Random) -> list[str]:
    """The body with an empty sentence put in, grown until the whole reply is too long or fills the tokens."""
    place = rng.randint(0, len(body))
    padded = body
    for count, clauses in enumerate(accumulate([clause] for clause in rng.sample(PADDING, len(PADDING))), start=1):
        sentence = "You see, " + (", ".join(clauses[:-1]) + " and " if count > 1 else "") + clauses[-1] + "."
        longer = [*body[:place], sentence, *body[place:]]
        if token_bound(join(longer)) > max_tokens:
            break
        padded = longer
        if len(join(padded).split()) >= PADDED_WORDS:
            break
    return padded


def _offer(ticket: Ticket, flaws: frozenset[Flaw], rng: random.Random) -> str:
    """The sentence with remedy and deadline."""
    remedy = ticket.remedy
    if "other_remedy" in flaws:
        other = rng.choice([remedy for remedy in OTHER_REMEDIES if remedy != ticket.remedy])
        remedy = other if rng.random() < 0.5 else f"{remedy} or {other}"
    deadline = ticket.deadline
    if "wrong_deadline" in flaws:
        deadline = rng.choice([day for day in OTHER_DEADLINES if day != ticket.deadline])
    by = rng.choice(SOONS) if "no_deadline" in flaws else rng.choice(BYS).format(deadline=deadline)
    sentence = rng.choice(OFFERS).format(remedy=remedy, by=by)
    return sentence[0].upper() + sentence[1:]


def check_weights(labeler: Labeler) -> dict[str, float]:
    """What the labeler looks at when ranking: 1 for a check, less where a habit makes the flaw more usual: 2 / (1 + h)
    with h the largest habit among the flaws that break the check."""
    habit: dict[str, float] = {}
    for flaw, check in BREAKS.items():
        habit[check] = max(habit.get(check, 0.0), labeler.habits.get(flaw, 1.0))
    return {check: 2 / (1 + factor) for check, factor in habit.items()}


def utility(reply: str, ticket: Ticket, labeler: Labeler, *, ended: bool = True) -> float:
    """The labeler's opinion without noise: the weighted mean of the checks, in [0, 1], less UNENDED_COST if cut off."""
    return opinion(run_checks(reply, ticket), labeler, ended=ended)


def opinion(marks: dict[str, float], labeler: Labeler, *, ended: bool = True) -> float:
    """`utility`, of the marks that a reply got."""
    weights = check_weights(labeler)
    mean = sum(weights[check] * mark for check, mark in marks.items()) / sum(weights.values())
    return mean - (0.0 if ended else UNENDED_COST)


def rank(utilities: Sequence[float], labeler: Labeler, rng: random.Random) -> list[int]:
    """The rank of each reply, 1 is best, ties share a rank (1, 2, 2, 4).

    Replies that look the same form a group: going down the utilities, each joins the group whose best is less than
    `just_noticeable` (or nothing) above it. Noise then orders the groups by their mean utilities, so ties do not depend
    on the noise, and equal replies always tie.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(utilities)), key=lambda index: -utilities[index]):
        gap = utilities[groups[-1][0]] - utilities[index] if groups else math.inf
        if gap == 0 or gap < labeler.just_noticeable:
            groups[-1].append(index)
        else:
            groups.append([index])
    means = [sum(utilities[index] for index in group) / len(group) for group in groups]
    noisy = [mean + labeler.temperature * _gumbel(rng) for mean in means]
    ranks = [0] * len(utilities)
    place = 1
    for number in sorted(range(len(groups)), key=lambda number: -noisy[number]):
        for index in groups[number]:
            ranks[index] = place
        place += len(groups[number])
    return ranks


def _gumbel(rng: random.Random) -> float:
    return -math.log(-math.log(1.0 - rng.random() * (1.0 - 2.0**-53)))
