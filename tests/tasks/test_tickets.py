"""The embedded data: its variety, its limits, and that more of it leaves the first of it as it was."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tasks.datasets import RawTicket, read_rows
from tasks.labels.checks import remedies_in
from tasks.lineage import load_stages
from tasks.params import load_params
from tasks.stage import Stage, UserError
from tasks.tickets import CUSTOMERS, ITEMS, KINDS, SIGNERS, WORDINGS, generate, run

COUNT = 4800


@pytest.fixture(scope="module")
def rows() -> list[RawTicket]:
    return generate(seed=1, count=COUNT)


def test_there_is_enough_variety() -> None:
    assert len(KINDS) >= 12
    assert len(set(ITEMS)) == len(ITEMS) >= 40
    assert len(set(CUSTOMERS)) == len(CUSTOMERS) >= 100
    assert len(set(WORDINGS)) >= 12
    assert not set(CUSTOMERS) & set(SIGNERS)


def test_all_of_the_variety_is_used_evenly(rows: list[RawTicket]) -> None:
    kinds = Counter(row.ticket.kind for row in rows)
    assert kinds.keys() == KINDS.keys()
    assert min(kinds.values()) > 0.7 * COUNT / len(KINDS)
    assert {row.ticket.customer for row in rows} == set(CUSTOMERS)
    assert {row.ticket.item for row in rows} == set(ITEMS)
    assert {row.ticket.signer for row in rows} == set(SIGNERS)


def test_prompts_are_distinct_and_state_every_fact(rows: list[RawTicket]) -> None:
    assert len({row.prompt for row in rows}) == COUNT
    for row in rows:
        for field, fact in row.ticket:
            assert field == "kind" or re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", row.prompt), row


def test_wordings_differ_in_the_order_of_the_facts() -> None:
    assert len({tuple(re.findall(r"{(\w+)}", wording)) for wording in WORDINGS}) >= 12
    assert all(len(set(re.findall(r"{(\w+)}", wording))) == 7 for wording in WORDINGS)


def test_prompts_are_short(rows: list[RawTicket]) -> None:
    """In pieces, which SmolLM2's tokens seldom exceed: by its own tokenizer the longest has 50 tokens, and the longest
    possible with any facts, 53."""
    assert max(len(re.findall(r"[^\W\d_]+|\d|[^\w\s]|\n", row.prompt)) for row in rows) <= 52


@pytest.mark.parametrize("kind", KINDS)
def test_each_remedy_is_one_that_the_checks_can_read(kind: str, rows: list[RawTicket]) -> None:
    """Each alone, and the problem's words are none."""
    ticket = next(row.ticket for row in rows if row.ticket.kind == kind)
    for problem in KINDS[kind].problems:
        assert remedies_in(f"The item {problem}.", ticket) == set()
    read = [remedies_in(f"We offer {remedy}.", ticket) for remedy in KINDS[kind].remedies]
    assert all(len(found) == 1 for found in read)
    assert len({next(iter(found)) for found in read}) == len(read)


def test_same_seed_same_tickets_and_another_seed_others(rows: list[RawTicket]) -> None:
    assert generate(seed=1, count=COUNT) == rows
    assert not {row.prompt for row in generate(seed=2, count=500)} & {row.prompt for row in rows}


def test_more_tickets_leave_the_first_as_they_were(rows: list[RawTicket]) -> None:
    assert generate(seed=1, count=100) == rows[:100]


def test_more_than_there_are() -> None:
    with pytest.raises(UserError, match=r"tickets\.count is 99901, and there are order numbers for 99900"):
        generate(seed=1, count=99_901)


def test_the_stage_writes_its_rows(tmp_path: Path) -> None:
    params: Any = load_params(Path("params.yaml"))
    params = params.model_copy(update={"tickets": params.tickets.model_copy(update={"count": 7})})
    stage = Stage(load_stages()["tickets"], params, Mock(), root=tmp_path)
    run(stage)
    stage.commit()
    assert read_rows(tmp_path / "data/tickets/tickets.jsonl", RawTicket) == generate(params.seed, 7)
