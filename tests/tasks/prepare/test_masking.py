"""What is masked, and what only looks alike. All numbers are made up or the issuers' own for tests."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.prepare.masking import PersonalData, mask

ALL: list[PersonalData] = ["email", "phone", "card"]
# made of what the searches look for, so that they meet and overlap
DENSE = st.lists(
    st.sampled_from(
        [
            *("joe@example.com", "+44 20 7031 3000", "650-253-0000", "4111 1111 1111 1111", "378282246310005", "call "),
            *"0123456789 .-+()@a\n[]",
        ]
    )
).map("".join)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to joe.o'neil+shop@mail.example.co.uk.", "Write to [EMAIL]."),
        ("<joe@example.com>, 'ann@example.com'", "<[EMAIL]>, '[EMAIL]'"),
        ("müller@exämple.de", "[EMAIL]"),
        ("call 650-253-0000 or (650) 253-0000 ext. 12", "call [PHONE] or [PHONE]"),
        ("650.253.0000, 1-800-356-9377", "[PHONE], [PHONE]"),
        ("Mobile: 6502530000", "Mobile: [PHONE]"),
        ("tel:+1-650-253-0000", "tel:[PHONE]"),
        ("+44 20 7031 3000; +49 (0)30 901820; +8613800138000", "[PHONE]; [PHONE]; [PHONE]"),
        ("Visa 4111 1111 1111 1111, 4222222222222", "Visa [CARD], [CARD]"),
        ("5105-1051-0510-5100", "[CARD]"),
        ("3782 822463 10005 and 30569309025904", "[CARD] and [CARD]"),
        ("6011111111111117 3530111333300000", "[CARD] [CARD]"),
    ],
)
def test_personal_data(text: str, masked: str) -> None:
    assert mask(text, ALL) == (
        masked,
        {kind: masked.count(f"[{kind.upper()}]") for kind in ALL if kind.upper() in masked},
    )


@pytest.mark.parametrize(
    "text",
    [
        "npm install foo@1.2.3, @app.route, a@b",
        "order 4155552671, order 415-5552-671, #4821",  # no phone number that is valid is written 3-4-3
        "2024-01-15 10:30:00, 14/03/2020, 1999-2000-2001, at 1700000000",
        "$1,234,567.00 and 3600000000000 + 62426244000 = 2+44 20 7031 3000",
        "3.14159265358979, 0.4111111111111111",
        "ISBN 978-3-16-148410-0, 192.168.100.200, 020 7031 3000",
        "555-253-0000",  # no area
        "4111 1111 1111 1112",  # check digit
        "1111 1111 1111 1117",  # check digit is right, no issuer
        "41111111111111",  # length
        "deadbeef4111111111111111",
    ],
)
def test_what_looks_alike_stays(text: str) -> None:
    assert mask(text, ALL) == (text, {})


def test_only_what_is_asked_for() -> None:
    text = "joe@example.com 650-253-0000 4111111111111111"
    assert mask(text, []) == (text, {})
    assert mask(text, ["phone"]) == ("joe@example.com [PHONE] 4111111111111111", {"phone": 1})


def test_a_number_after_many_that_are_none() -> None:
    text = "+1 " * 66_000  # the library alone gives up after 65535
    assert mask(f"{text} +44 20 7031 3000", ["phone"]) == (f"{text} [PHONE]", {"phone": 1})


def test_the_lines_of_a_text_keep_their_places() -> None:
    text = "2024\n+44 20 7031 3000, +44 20 7031 3000\n\n1 650-253-0000\n650-253-0000\n\u2028call 6502530000"
    masked = "2024\n[PHONE], [PHONE]\n\n[PHONE]\n[PHONE]\n\u2028call [PHONE]"
    assert mask(text, ALL) == (masked, {"phone": 5})


def test_all_are_counted() -> None:
    assert mask("a@b.org a@b.org +1 650 253 0000 650-253-0000", ALL)[1] == {"email": 2, "phone": 2}


@given(DENSE | st.text())
def test_masking_twice_changes_nothing_more(text: str) -> None:
    masked, _ = mask(text, ALL)
    assert mask(masked, ALL) == (masked, {})


@given(st.text(st.characters(exclude_categories=["Nd", "Cs"], exclude_characters="@")))
def test_a_text_without_digits_and_at_signs_stays(text: str) -> None:
    assert mask(text, ALL) == (text, {})


@pytest.mark.parametrize("text", ["9", "a@", "1-", "+1 ", "a.b'", "1234 5678 ", "2024-01-15 10 ", "call 12345 "])
def test_a_megabyte_of_anything_takes_seconds(text: str) -> None:
    start = time.process_time()
    mask(text * (10**6 // len(text)) + "@", ALL)
    assert time.process_time() - start < 5


def test_a_phone_number_makes_the_other_lines_no_slower() -> None:
    start = time.process_time()
    assert mask("1234567\n" * 125_000 + "650-253-0000", ALL)[1] == {"phone": 1}
    assert time.process_time() - start < 5
