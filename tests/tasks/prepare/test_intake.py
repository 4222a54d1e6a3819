"""From rows to tables: nothing is lost on the way, and what is measured is right."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tasks.conversations import single
from tasks.datasets import prompt_id
from tasks.prepare.intake import Raw, Settings, take
from tests.tasks.prepare.test_fuzz import damaged_bytes, damaged_row, time_limit


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A word is a token."""
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    words.save(str(file))
    return Settings("rankings", "auto", {}, file, 3, max_prompt_tokens=20, max_response_tokens=10, common_prefix=12)


def line(**row: Any) -> bytes:
    return json.dumps(row).encode()


def test_by_hand(settings: Settings) -> None:
    turns = [*single("first things first"), {"role": "assistant", "content": "yes"}, *single("and now this")]
    rows: list[Raw] = [
        (1, line(prompt="one two", responses=["a b c", "d", "e"], ranking=[1, 2, 2])),
        (4, line(prompt=turns, chosen="good", rejected="bad", user="ann", labeler="bo")),
    ]
    taken = take(rows, settings)
    assert taken.damaged == []
    first, second = taken.examples.to_pylist()
    wanted = {"row": 1, "prompt_tokens": 2, "response_tokens": 4, "pairs": 3, "tied_pairs": 1, "user": 0, "prefix": 0}
    assert {name: first[name] for name in wanted} == wanted  # three words and the end token; "one two" is short
    assert f"{first['id']:016x}" == prompt_id(single("one two"))
    assert (second["row"], second["prompt_tokens"], second["labeler"]) == (4, 3 + 1 + 3 + 2 * 3, "bo")
    assert second["user"] != 0
    assert second["prefix"] != 0
    assert json.loads(second["prompt"]) == turns
    assert taken.ids.tolist() == [first["id"], second["id"]]
    assert taken.signatures.shape == (2, 128)


def test_the_same_ranking_in_another_order_is_the_same_content(settings: Settings) -> None:
    rows: list[Raw] = [
        (1, line(prompt="p", responses=["a", "b", "c"], ranking=[1, 2, 3])),
        (2, line(prompt="p", responses=["c", "a", "b"], ranking=[3, 1, 2])),
        (3, line(prompt="p", responses=["a", "b", "c"], ranking=[2, 1, 3])),
        (4, line(prompt="p", responses=["a", "b", "c"], ranking=[1, 2, 3], labeler="bo")),
    ]
    first, second, third, fourth = (one["content"] for one in take(rows, settings).examples.to_pylist())
    assert first == second
    assert len({first, third, fourth}) == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "w " * 21, "chosen": "a", "rejected": "b"}, "prompt too long"),
        ({"prompt": "p", "chosen": "w " * 10, "rejected": "b"}, "response too long"),
    ],
)
def test_too_long(settings: Settings, row: dict[str, str], reason: str) -> None:
    taken = take([(7, line(**row))], settings)
    assert [(one["row"], one["reason"]) for one in taken.damaged] == [(7, reason)]
    assert len(taken.examples) == 0
    assert taken.ids.tolist() == []
    shorter = {name: text[:-2] for name, text in row.items() if len(text) > 1}
    assert len(take([(7, line(**row | shorter))], settings).examples) == 1


def test_no_damaged_row_is_lost(settings: Settings) -> None:
    rng = random.Random(4)
    rows: list[Raw] = []
    for number in range(3000):
        row = damaged_row(rng)
        if rng.random() < 0.5:
            rows.append((number, row))
        else:
            rows.append((number, damaged_bytes(json.dumps(row, default=str).encode(), rng)))
    for kind in ("rankings", "demonstrations", "prompts"):
        with time_limit(60):
            taken = take(
                rows, Settings(kind, "auto", {}, settings.tokenizer, 3, 20, 10, 12, ("email", "phone", "card"))
            )
        told = {one["row"] for one in taken.damaged} | set(taken.examples["row"].to_pylist())
        assert told == set(range(3000))
        assert len(taken.damaged) > 1000
        assert len(taken.examples) > 100
        json.dumps(taken.damaged).encode()
