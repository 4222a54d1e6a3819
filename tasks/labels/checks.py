"""What can be seen of a reply to a support ticket: nine checks, each a pure function of the reply's text and the facts.

Each gives a number in [0, 1], where 1 is right. They are made for free text that a language model may write: anything
that they cannot read counts as not there. The simulated labelers and the gold score both look through these checks,
each with weights of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tasks.datasets import Ticket

GREETING_WORDS = 6  # the customer's name stands among the first six words
SIGNATURE_WORDS = 4  # the signer's name stands among the last four words

# A reply of 14 to 37 words fits; the mark falls in a line to 0 at 4 words below and at 44 above.
FIT_WORDS = (4, 14, 37, 44)


def greets_by_name(reply: str, ticket: Ticket) -> float:
    """The customer's name stands at the beginning."""
    return float(_has_phrase(" ".join(reply.split()[:GREETING_WORDS]), ticket.customer))


def states_order(reply: str, ticket: Ticket) -> float:
    """The order number, and not as a part of a longer number."""
    return float(re.search(rf"(?<!\d){re.escape(ticket.order)}(?!\d)", reply) is not None)


def names_item(reply: str, ticket: Ticket) -> float:
    """The item in full; half a mark for its last word alone ("bottle" for "water bottle")."""
    if _has_phrase(reply, ticket.item):
        return 1.0
    return 0.5 if _has_phrase(reply, ticket.item.split()[-1]) else 0.0


def apologizes_once(reply: str, _ticket: Ticket) -> float:
    """One apology: none is rude, two are grovelling."""
    return float(len(_APOLOGY.findall(reply)) == 1)


def offers_remedy(reply: str, ticket: Ticket) -> float:
    """The remedy that the shop offers, and no other."""
    offered = remedies_in(ticket.remedy, ticket)
    named = remedies_in(reply, ticket)
    if offered:
        return float(named == offered)
    # a remedy outside our list, from a team's own data: its words in the reply, and none of the list
    return float(not named and _has_phrase(reply, re.sub(r"^(an?|the) ", "", ticket.remedy)))


def states_deadline(reply: str, ticket: Ticket) -> float:
    """The deadline; a date in either order. Other dates beside it are for `invents_nothing` to see."""
    wanted = _dates(ticket.deadline)
    return float(wanted <= _dates(reply) if wanted else _has_phrase(reply, ticket.deadline))


def is_signed(reply: str, ticket: Ticket) -> float:
    """The signer's name stands at the end."""
    return float(_has_phrase(" ".join(reply.split()[-SIGNATURE_WORDS:]), ticket.signer))


def fits_length(reply: str, _ticket: Ticket) -> float:
    """Words from a fitting number to too few or too many, in a straight line. See FIT_WORDS."""
    none, low, high, too_many = FIT_WORDS
    words = len(reply.split())
    return max(0.0, min(1.0, (words - none) / (low - none), (too_many - words) / (too_many - high)))


def invents_nothing(reply: str, ticket: Ticket) -> float:
    """No number, date, name or promise that the ticket does not hold, and no blank left to fill in."""
    facts = " ".join(ticket.model_dump(exclude={"kind"}).values())
    known = tuple(word.lower() for word in _WORD.findall(facts))
    invented = (
        set(_NUMBER.findall(reply)) - set(_NUMBER.findall(facts))
        or _dates(reply) - _dates(facts)
        or any(not any(word.startswith(name) for word in known) for name in _names(reply))
        or _PROMISE.search(reply)
        or _BLANK.search(reply)
    )
    return float(bool(reply.strip()) and not invented)


CHECKS: dict[str, Callable[[str, Ticket], float]] = {
    "name": greets_by_name,
    "order": states_order,
    "item": names_item,
    "apology": apologizes_once,
    "remedy": offers_remedy,
    "deadline": states_deadline,
    "signature": is_signed,
    "length": fits_length,
    "invention": invents_nothing,
}


def run_checks(reply: str, ticket: Ticket) -> dict[str, float]:
    """{check: mark in [0, 1]} in the order of CHECKS."""
    return {name: check(reply, ticket) for name, check in CHECKS.items()}


def remedies_in(text: str, ticket: Ticket) -> set[str]:
    """The remedies that a text offers, by their names here. One that is denied ("we cannot give a refund") does not
    count, nor do words of the item's name or of the problem."""
    text = re.sub(rf"\b{re.escape(ticket.problem)}\b", " , ", text, flags=re.IGNORECASE)
    text = re.sub(rf"\b{re.escape(ticket.item)}\b", "ITEM", text, flags=re.IGNORECASE)
    found = set()
    for name, pattern in _REMEDIES.items():
        for match in pattern.finditer(text):
            if not _DENIAL.search(text[: match.start()]):
                found.add(name.format(*match.groups()))
        text = pattern.sub(" ", text)  # so that "partial refund" is not read again as "refund"
    if any("%" in name for name in found):
        found.discard("discount")  # "20% off; the discount is yours by Friday" offers one thing
    return found


def _has_phrase(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def _dates(text: str) -> set[tuple[str, ...]]:
    """Weekdays as ("fri",), dates as ("mar", "14"), near days as ("tomorrow",)."""
    dates: set[tuple[str, ...]] = {(match[:3].lower(),) for match in _WEEKDAY.findall(text)}
    dates |= {(month[:3].lower(), day) for day, month in _DAY_MONTH.findall(text)}
    dates |= {(month[:3].lower(), day) for month, day in _MONTH_DAY.findall(text)}
    return dates | {(match.lower(),) for match in _NEAR_DAY.findall(text)}


def _names(text: str) -> set[str]:
    """Lower-cased words written as names are: capitalised within a sentence, or alone before a comma or line end."""
    return {
        match.group().lower()
        for match in _CAPITALISED.finditer(text)
        if match.group().lower() not in _COMMON
        and (not _SENTENCE_START.search(text[: match.start()]) or _STANDS_ALONE.match(text, match.end()))
    }


_APOLOGY = re.compile(r"\b(?:sorry|apolog\w*|regret\w*|forgive)\b", re.IGNORECASE)

# In order of reading: an earlier pattern takes its words away from the later ones.
_REMEDIES = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "spare part": r"\b(?:spare|missing|new|replacement) (?:parts?|pieces?)\b",
        "return label": r"\b(?:return|prepaid|shipping) labels?\b",
        "support call": r"\b(?:support|phone|help) call\b|\bcall from\b|\b(?:call|phone) you\b",
        "partial refund": r"\b(?:partial(?:ly)?|partly|half)(?: a| the)? refund\w*"
        r"|\brefund\w*(?: you)? (?:in part|partially|partly|half)\b",
        "full refund": r"\brefund\w*|\bmoney back\b|\breimburs\w*",
        "store credit": r"\bcredit(?:s|ed)?\b(?! cards?)",
        "gift card": r"\bgift ?cards?\b|\bvouchers?\b",
        "{0}% discount": r"(?:\bdiscount of )?(\d+) ?(?:%|percent\b)(?: discount| off)?",
        "discount": r"\bdiscount\w*",
        "new delivery": r"\b(?:new|second|another) (?:delivery|shipment)\b|\bre-?deliver\w*|\bre-?s(?:end|ent|hip)\w*"
        r"|\bdeliver (?:it|ITEM|the ITEM|your ITEM) again\b",
        "exchange": r"\bexchang\w*|\bswap\w*",
        "replacement": r"\breplac(?:e|es|ed|ing|ements?)\b|\b(?:new|another) (?:one|ITEM)\b",
        "repair": r"\brepair\w*|\bmend\w*",
    }.items()
}
_DENIAL = re.compile(
    r"(?:\bnot|n't|n’t|\bcannot|\bwithout|\bunable to|\binstead of|\brather than)(?: +\w+){0,3} +$", re.IGNORECASE
)

_MONTH = (
    r"(Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)"
)
_DAY = r"0?(\d{1,2})(?:st|nd|rd|th)?"
_WEEKDAY = re.compile(r"\b((?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?)\b", re.IGNORECASE)
_DAY_MONTH = re.compile(rf"(?<!\d){_DAY} (?:of )?{_MONTH}\b", re.IGNORECASE)
_MONTH_DAY = re.compile(rf"\b{_MONTH}\.? (?:the )?{_DAY}(?!\d)", re.IGNORECASE)
_NEAR_DAY = re.compile(r"\b(today|tonight|tomorrow|yesterday)\b", re.IGNORECASE)

_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d_]+")
_CAPITALISED = re.compile(r"\b[A-Z][a-z]+\b")
_SENTENCE_START = re.compile(r"(?:^|[.!?:;\"“\n–—-]|^[^,.!?\n]+,)\s*$")  # after "Hi Ann," too
_STANDS_ALONE = re.compile(r"\s*(?:,|$|\n)")
_PROMISE = re.compile(
    r"\b(?:guarantee\w*|compensat\w*|bonus\w*|free gifts?|lifetime|surprise|priority|upgrade\w*)\b|[$€£]",
    re.IGNORECASE,
)
_BLANK = re.compile(r"\[[^\]]*\]|<[^>]*>|\{[^}]*\}|_{3,}|\w@\w|https?:|www\.", re.IGNORECASE)

# Capitalised words that letters hold without naming anybody.
_LETTER_WORDS = (
    "dear hi hello hey greetings good morning afternoon evening day thanks thank you sorry apologies best kind warm "
    "regards wishes yours sincerely truly faithfully respectfully cheers warmly kindly please order item ticket "
    "customer representative manager department care service support team shop store sir madam unfortunately however "
    "also again therefore meanwhile finally first yes no we our it as the your this that if and but so re subject "
    "reply offer deadline problem remedy refund replacement exchange credit shortly soon hopefully additionally "
    "furthermore meantime then now here there"
)
_COMMON = frozenset(_LETTER_WORDS.split())
