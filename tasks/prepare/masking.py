"""Personal data in a text, replaced by a placeholder: e-mail addresses, phone numbers, numbers of payment cards.

What is only perhaps personal stays: sums, order numbers and time stamps are what models are to learn from as well.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import Literal, NamedTuple

from phonenumbers import Leniency, PhoneNumberMatcher
from stdnum import luhn

PersonalData = Literal["email", "phone", "card"]
REGION = "US"  # where a phone number without a country code is taken to be from

# at most 64 characters before the @ (RFC 5321); the domain ends with a name: foo@1.2.3 is a version of foo
EMAIL = re.compile(r"(?<!\w)\w[\w.+%'-]{0,63}@(?:[\w-]+\.)+[^\W\d_][\w-]*[^\W_]")

# What follows begins with a digit, and only then looks at what is before it: so the search is ten times faster.
# 13 to 19 digits in one run, in fours, or in 4-6-5 and 4-6-4 as on American Express and Diners Club; no decimals
CARD = re.compile(
    r"[0-9](?<![\w.].)"
    r"(?:[0-9]{12,18}|[0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{1,3})?|[0-9]{3}([ -])[0-9]{6}\2[0-9]{4,5})"
    r"(?!\w)"
)
# of Visa, Mastercard, American Express, Diners Club, Discover, JCB, UnionPay (ISO/IEC 7812)
ISSUED = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})"
    r"|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"
    r"|3[47][0-9]{13}"
    r"|(?:30[0-5][0-9]|3095|36[0-9]{2}|3[89][0-9]{2})[0-9]{10}"
    r"|(?:6011|64[4-9][0-9]|65[0-9]{2}|62[0-9]{2}|35[2-8][0-9])[0-9]{12,15}"
)

# At least this must be there for the slow search for phone numbers to be worth it.
GAP = r"[-./() \u00a0\u2010-\u2015]"
INTERNATIONAL = re.compile(rf"\+(?<![\w+].)[0-9(](?:{GAP}{{0,3}}[0-9]){{6}}")
NATIONAL = re.compile(rf"[0-9](?<![0-9.].)[0-9]{{2,3}}{GAP}{{0,3}}[0-9]{{3}}{GAP}{{0,2}}[0-9]{{4}}(?![0-9])")
BY_PHONE = re.compile(
    r"\b(?:call|phone|telephone|tel|cell|mobile|fax|text|sms|whatsapp)\b[^\d\n]{0,20}$", re.IGNORECASE
)


class Span(NamedTuple):
    start: int
    end: int


def mask(text: str, kinds: Sequence[PersonalData]) -> tuple[str, dict[str, int]]:
    """The text with [EMAIL], [PHONE] and [CARD] in place of what it has of these kinds, and how many of each it had.

    Phone numbers are those that the `phonenumbers` library holds to be valid: with a country code as +CODE, without one
    of the United States and grouped as there, or in one run of digits after a word such as "call": of other runs most
    are sums and order numbers. Card numbers have an issuer's first digits and length and a right check digit (Luhn).
    Masking what is masked changes nothing.
    """
    found: dict[str, int] = {}
    changed = True
    while changed:  # a placeholder can part what stood together, and so uncover a number
        changed = False
        for kind, search in SEARCHES:
            spans = list(search(text)) if kind in kinds else []
            if spans:
                text = replaced(text, spans, f"[{kind.upper()}]")
                found[kind] = found.get(kind, 0) + len(spans)
                changed = True
    return text, found


def replaced(text: str, spans: Sequence[Span], placeholder: str) -> str:
    """spans: apart, in their order."""
    kept = pairwise([0, *chain.from_iterable(spans), len(text)])
    return placeholder.join(text[start:end] for start, end in islice(kept, 0, None, 2))


def emails(text: str) -> Iterator[Span]:
    if "@" in text:
        for match in EMAIL.finditer(text):
            yield Span(*match.span())


def cards(text: str) -> Iterator[Span]:
    for match in CARD.finditer(text):
        number = re.sub(r"\D", "", match[0])
        if ISSUED.fullmatch(number) and luhn.is_valid(number):
            yield Span(*match.span())


def international_phones(text: str) -> Iterator[Span]:
    for line in lines_with(INTERNATIONAL, text):
        for match in phones(text[line.start : line.end], None, Leniency.VALID):
            start, end = line.start + match.start, line.start + match.end
            # "2 + 44..." is a sum
            if INTERNATIONAL.match(text, start):
                yield Span(start, end)


def national_phones(text: str) -> Iterator[Span]:
    for line in lines_with(NATIONAL, text):
        for match in phones(text[line.start : line.end], REGION, Leniency.STRICT_GROUPING):
            start, end = line.start + match.start, line.start + match.end
            if "+" not in match.raw_string and (not match.raw_string.isdigit() or said_to_be_phone(text, start)):
                yield Span(start, end)


def lines_with(pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    """The lines in which it is found: a phone number ends where its line does."""
    end = 0
    while match := pattern.search(text, end):
        start = text.rfind("\n", 0, match.start()) + 1
        end = text.find("\n", match.end())
        end = len(text) if end < 0 else end
        yield Span(start, end)


def phones(line: str, region: str | None, leniency: int) -> PhoneNumberMatcher:
    """All of them: by itself the library gives up after 65535 candidates."""
    return PhoneNumberMatcher(line, region, leniency=leniency, max_tries=sys.maxsize)


def said_to_be_phone(text: str, start: int) -> bool:
    return bool(BY_PHONE.search(text, max(0, start - 40), start))


# an address may hold digits, and a card number begin as a phone number does
SEARCHES: tuple[tuple[PersonalData, Callable[[str], Iterator[Span]]], ...] = (
    ("email", emails),
    ("card", cards),
    ("phone", international_phones),
    ("phone", national_phones),
)
