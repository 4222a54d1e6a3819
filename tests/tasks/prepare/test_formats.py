"""Rows of every format, and what makes them damaged."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from tasks.conversations import Turn, single
from tasks.params import Kind
from tasks.prepare.formats import FORMATS, Damaged, Example, check_format, examples_of
from tasks.stage import UserError

USER: Turn = {"role": "user", "content": "Q"}
ASSISTANT: Turn = {"role": "assistant", "content": "A"}
TALK: list[Turn] = [USER, ASSISTANT, {"role": "user", "content": "Q2"}]


def one(row: dict[str, Any], kind: Kind, format: str = "auto", **columns: str) -> Example:
    (example,) = examples_of(row, kind, format, columns)
    return example


def damage(row: dict[str, Any], kind: Kind, format: str = "auto", **columns: str) -> tuple[str, str]:
    """(reason, what is told)"""
    with pytest.raises(Damaged) as caught:
        examples_of(row, kind, format, columns)
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_recognised_by_its_example(name: str) -> None:
    for kind in {*FORMATS[name].kinds, "prompts"}:
        row = FORMATS[name].example
        assert examples_of(row, kind, "auto", {}) == examples_of(row, kind, name, {})
        assert examples_of(row, kind, "auto", {})


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "Q", "response": "A"}, single("Q"), "A"),
        ({"prompt": "Q", "completion": "A"}, single("Q"), "A"),
        ({"prompt": TALK, "completion": [{"role": "assistant", "content": "A2"}]}, TALK, "A2"),
        ({"prompt": "Q", "response": "A", "system": "S"}, [{"role": "system", "content": "S"}, USER], "A"),
        ({"prompt": "Q", "response": "A", "system": ""}, single("Q"), "A"),
        ({"prompt": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q2\n\nAssistant:", "response": "A2"}, TALK, "A2"),
        ({"prompt": "Q", "response": "A", "chosen": None, "rejected": None}, single("Q"), "A"),
        ({"instruction": "Q", "input": "", "output": "A"}, single("Q"), "A"),
        ({"instruction": "Q", "input": "more", "output": "A"}, single("Q\nmore"), "A"),
        ({"instruction": "Q2", "output": "A2", "history": [["Q", "A"]]}, TALK, "A2"),
        ({"question": "Q", "answer": "A"}, single("Q"), "A"),
        ({"messages": [*TALK, {"role": "assistant", "content": "A2"}]}, TALK, "A2"),
        ({"messages": [{"role": "system", "content": " "}, USER, ASSISTANT]}, single("Q"), "A"),
        ({"messages": json.dumps([USER, ASSISTANT])}, single("Q"), "A"),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "chatgpt", "value": "A"}], "system": "S"},
            [{"role": "system", "content": "S"}, USER],
            "A",
        ),
    ],
)
def test_demonstrations(row: dict[str, Any], prompt: list[Any], response: str) -> None:
    assert one(row, "demonstrations")[:3] == (prompt, [response], [])


@pytest.mark.parametrize(
    ("row", "prompt", "responses", "ranks"),
    [
        (
            {"prompt": "Q", "responses": ["a", "b", "c", "d"], "ranking": [1, 2, 2, 4]},
            single("Q"),
            "abcd",
            [1, 2, 2, 3],
        ),
        ({"prompt": "Q", "responses": ["a", "b", "c"], "ranking": [[2], [0, 1]]}, single("Q"), "abc", [2, 2, 1]),
        ({"prompt": "Q", "responses": ["a", "b", "c"], "ranking": "C > A = B"}, single("Q"), "abc", [2, 2, 1]),
        ({"prompt": "Q", "responses": '["a", "b"]', "ranking": "[2, 1]"}, single("Q"), "ab", [2, 1]),
        ({"prompt": "Q", "responses": ["a", "b", "c"], "scores": [0.5, 2, 0.5]}, single("Q"), "abc", [2, 1, 2]),
        ({"prompt": "Q", "responses": ["a", "b"], "correct": [False, True]}, single("Q"), "ab", [2, 1]),
        ({"prompt": "Q", "responses": ["a", "b"], "correct": [False, False]}, single("Q"), "ab", [1, 1]),
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, single("Q"), "ab", [1, 2]),
        ({"prompt": TALK, "chosen": [ASSISTANT], "rejected": "b"}, TALK, "Ab", [1, 2]),
        (
            {"prompt": "Q", "chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "b"}]},
            [USER],
            "Ab",
            [1, 2],
        ),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "b"}]}, [USER], "Ab", [1, 2]),
        (
            {
                "chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q2\n\nAssistant: a",
                "rejected": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q2\n\nAssistant: b",
            },
            TALK,
            "ab",
            [1, 2],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "A"},
                    {"from": "human", "value": "Q2"},
                ],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            TALK,
            "ab",
            [1, 2],
        ),
        ({"messages": TALK, "chosen": ASSISTANT, "rejected": "b"}, TALK, "Ab", [1, 2]),
        ({"prompt": "Q", "response_a": "a", "response_b": "b", "winner": "model_b"}, single("Q"), "ab", [2, 1]),
        (
            {
                "conversation_a": [USER, ASSISTANT],
                "conversation_b": [USER, {**ASSISTANT, "content": "b"}],
                "winner": "tie (bothbad)",
            },
            [USER],
            "Ab",
            [1, 1],
        ),
        (
            {
                "question": "Q",
                "ground_truth": "a",
                "6b": {"solution": "x", "is_correct": False},
                "175b": {"solution": "a", "is_correct": True},
            },
            single("Q"),
            "xa",
            [2, 1],
        ),
    ],
)
def test_rankings(row: dict[str, Any], prompt: list[Any], responses: str, ranks: list[int]) -> None:
    assert one(row, "rankings")[:3] == (prompt, list(responses), ranks)
    assert one(row, "prompts") == Example(prompt, [], [])


CELL = json.dumps([ASSISTANT])
WHOLE_CELL = json.dumps([USER, ASSISTANT])


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        ({"prompt": json.dumps(TALK), "response": CELL}, "demonstrations", Example(TALK, ["A"], [])),
        ({"prompt": ' [{"from": "human", "value": "Q"}]'}, "prompts", Example([USER], [], [])),
        ({"question": json.dumps([USER]), "answer": "A"}, "demonstrations", Example([USER], ["A"], [])),
        (
            {"prompt": json.dumps([USER]), "chosen": CELL, "rejected": "b"},
            "rankings",
            Example([USER], ["A", "b"], [1, 2]),
        ),
        (
            {"prompt": "Q", "chosen": WHOLE_CELL, "rejected": WHOLE_CELL.replace('"A"', '"b"')},
            "rankings",
            Example([USER], ["A", "b"], [1, 2]),
        ),
        (
            {"chosen": WHOLE_CELL, "rejected": WHOLE_CELL.replace('"A"', '"b"')},
            "rankings",
            Example([USER], ["A", "b"], [1, 2]),
        ),
        (
            {"conversation_a": WHOLE_CELL, "conversation_b": WHOLE_CELL.replace('"A"', '"b"'), "winner": "b"},
            "rankings",
            Example([USER], ["A", "b"], [2, 1]),
        ),
    ],
)
def test_messages_in_a_cell_of_a_table(row: dict[str, Any], kind: Kind, expected: Example) -> None:
    assert one(row, kind) == expected


@pytest.mark.parametrize(
    ("row", "reason", "told"),
    [
        ({"prompt": json.dumps([USER, USER]), "response": "A"}, "turns do not alternate", "prompt: turn 2"),
        ({"prompt": json.dumps([USER, {"role": "user"}]), "response": "A"}, "missing field", "prompt.1.content: is"),
        ({"prompt": '[{"role": "user", "content": null}]', "response": "A"}, "wrong type", "prompt.0.content: is null"),
        ({"prompt": "Q", "response": json.dumps(TALK)}, "not one reply", "response: has 3 messages"),
    ],
)
def test_damaged_messages_in_a_cell_are_no_text(row: dict[str, Any], reason: str, told: str) -> None:
    found, message = damage(row, "demonstrations")
    assert found == reason
    assert message.startswith(told)


@pytest.mark.parametrize(
    "text",
    [
        *("[1, 2]", "[]", "[citation needed]", '[{"role": "user", "content": "Q"}', '["role", "content"]', "[[]]"),
        *(
            '{"role": "user", "content": "Q"}',
            '[{"role": "king"}]',
            '[{"role": "user", "content": "Q"}, 3]',
            "[" * 2000,
        ),
    ],
)
def test_a_text_that_only_looks_like_messages_stays_text(text: str) -> None:
    assert one({"prompt": text, "response": text}, "demonstrations")[:2] == (single(text), [text])


def test_each_annotator_s_vote_is_a_ranking() -> None:
    votes = [{"annotator": "ann", "choice": "b"}, {"annotator": 7, "choice": "tie"}]
    row = {"prompt": "Q", "response_a": "a", "response_b": "b", "votes": votes, "user_id": 3}
    assert examples_of(row, "rankings", "auto", {}) == [
        Example(single("Q"), ["a", "b"], [2, 1], "ann", "3"),
        Example(single("Q"), ["a", "b"], [1, 1], "7", "3"),
    ]
    assert examples_of(row, "prompts", "auto", {}) == [Example(single("Q"), [], [], user="3")]


def test_a_tree_gives_an_example_at_every_prompter_s_message() -> None:
    def said(role: str, text: str, *replies: Any, **facts: Any) -> dict[str, Any]:
        return {"role": role, "text": text, "replies": list(replies), **facts}

    row = {
        "message_tree_id": "t1",
        "prompt": said(
            "prompter",
            "Q",
            said("assistant", "worse", rank=2),
            said("assistant", "deleted", said("prompter", "never asked"), rank=0, deleted=True),
            said("assistant", "A", said("prompter", "Q2", said("assistant", "only")), rank=1),
            said("assistant", "spam", rank=3, review_result=False),
            said("assistant", "unranked", said("prompter", "unanswered")),
        ),
    }
    to_unranked: list[Turn] = [
        USER,
        {"role": "assistant", "content": "unranked"},
        {"role": "user", "content": "unanswered"},
    ]
    assert examples_of(row, "rankings", "auto", {}) == [Example(single("Q"), ["worse", "A"], [2, 1], user="t1")]
    assert examples_of(row, "demonstrations", "auto", {}) == [
        Example(single("Q"), ["A"], [], user="t1"),
        Example(TALK, ["only"], [], user="t1"),
    ]
    assert [example.prompt for example in examples_of(row, "prompts", "auto", {})] == [single("Q"), TALK, to_unranked]
    assert damage({**row, "prompt": said("prompter", "Q")}, "rankings")[0] == "no ranking"


def test_the_default_tickets_keep_their_facts() -> None:
    row = FORMATS["tickets"].example
    assert one(dict(row), "prompts") == Example(single("Write to Maria about ..."), [], [], ticket=row["ticket"])
    assert damage({"prompt": "Q", "ticket": {**row["ticket"], "order": 4821}}, "prompts") == (
        "not a ticket",
        "ticket.order: Input should be a valid string",
    )


def test_who_labelled_and_for_whom() -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "worker": " w1 ", "annotator": None, "group": "", "user": 12}
    assert one(row, "rankings")[3:5] == ("w1", "12")
    assert damage({**row, "user": True}, "rankings") == ("wrong type", "user: is true, not text")


@pytest.mark.parametrize(
    ("value", "taken"), [(17.0, "17"), ("17.0", "17"), ("v17.0", "v17.0"), ("17.00", "17.00"), ("1.17.0", "1.17.0")]
)
def test_whole_numbers_of_a_column_with_gaps(value: object, taken: str) -> None:
    assert one(PAIR | {"user_id": value, "labeler": value}, "rankings")[3:5] == (taken, taken)


@pytest.mark.parametrize("value", [17.5, float("nan"), float("inf")])
def test_a_fraction_is_no_user(value: float) -> None:
    assert damage(PAIR | {"user_id": value}, "rankings") == ("wrong type", "user_id: is a number, not text")


def test_texts_are_normalised() -> None:
    example = one({"prompt": " Cafe\u0301\r\nor tea? \n", "response": "\tA\n"}, "demonstrations")
    assert example[:2] == (single("Caf\u00e9\nor tea?"), ["A"])


def test_columns_rename_and_reach_into_objects() -> None:
    row = {"question": "Q", "answer": "unread", "out": {"texts": ["a", "b"]}, "a.b": "b", "prompt": "not this"}
    example = one(row, "rankings", prompt="question", chosen="out.texts.0", rejected="a.b")
    assert example == Example(single("Q"), ["a", "b"], [1, 2])
    del row["question"]  # the data's own `prompt` does not step in
    assert damage(row, "rankings", "pairs", prompt="question") == ("missing field", "question: is missing")


def test_an_error_names_the_field_as_the_data_do() -> None:
    row = {"question": "Q", "turns": [USER, {"role": "assistant", "content": True}]}
    assert damage(row, "demonstrations", messages="turns") == ("wrong type", "turns.1.content: is true, not text")
    assert damage({"prompt": "Q"}, "demonstrations", "prompt-response", response="reply") == (
        "missing field",
        "reply: is missing",
    )


PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "Q", "responses": ["a", "b"], "ranking": [1, 2]}


@pytest.mark.parametrize(
    ("row", "reason", "told"),
    [
        (PAIR | {"chosen": None}, "wrong type", "chosen: is null, not text"),
        (PAIR | {"chosen": 3}, "wrong type", "chosen: is a number, not text"),
        (PAIR | {"chosen": " \u3000\n"}, "empty text", "chosen: is empty"),
        (PAIR | {"chosen": "a\0"}, "NUL", "chosen: has a NUL"),
        (PAIR | {"chosen": "a\ud800"}, "lone surrogate", "chosen: has half a character"),
        (PAIR | {"chosen": "b "}, "equal responses", "has the same text as chosen and as rejected"),
        (
            PAIR | {"prompt": [USER, ASSISTANT]},
            "prompt does not end with the user",
            "prompt: ends with the assistant's",
        ),
        (
            PAIR | {"prompt": [USER, USER]},
            "turns do not alternate",
            "prompt: turn 2 (without the system's) is the user's",
        ),
        (PAIR | {"prompt": [ASSISTANT, USER]}, "turns do not alternate", "prompt: turn 1"),
        (PAIR | {"prompt": []}, "turns do not alternate", "prompt: has no turn of a user"),
        (PAIR | {"prompt": [{"role": "tool", "content": "x"}]}, "unknown role", "prompt.0.role: is 'tool', not one of"),
        (PAIR | {"prompt": [{"role": "user"}]}, "missing field", "prompt.0.content: is missing"),
        (PAIR | {"chosen": [USER]}, "unknown role", "chosen.0: is not the assistant's turn"),
        (PAIR | {"chosen": [USER, ASSISTANT], "rejected": "b"}, "not a transcript", "rejected: does not begin with"),
        (
            {"prompt": "other", "chosen": [USER, ASSISTANT], "rejected": "\n\nHuman: Q\n\nAssistant: b"},
            "prompt differs",
            "prompt: is not what",
        ),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: R\n\nAssistant: b"},
            "transcripts diverge before the last turn",
            "has two conversations",
        ),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: Q2", "rejected": "\n\nHuman: Q\n\nAssistant: b"},
            "no response",
            "chosen: ends with the user's turn",
        ),
        ({"chosen": "Q", "rejected": "R"}, "not a transcript", "chosen: does not begin with `Human:`"),
        (RANKED | {"ranking": [1]}, "ranks do not fit", "has 2 responses and 1 ranks"),
        (RANKED | {"ranking": [0, 1]}, "ambiguous ranking", "ranking: has ranks that are no whole numbers from 1"),
        (RANKED | {"ranking": [1.5, 1]}, "ambiguous ranking", "ranking: has ranks that are no whole numbers from 1"),
        (RANKED | {"ranking": [1, [0]]}, "ambiguous ranking", "ranking: has places with and without brackets"),
        (RANKED | {"ranking": [[0], [2]]}, "ranks do not fit", "ranking: names a response twice, or one that is not"),
        (RANKED | {"ranking": [[0], [0]]}, "ranks do not fit", "ranking: names a response twice, or one that is not"),
        (RANKED | {"ranking": [[0]]}, "ranks do not fit", "ranking: leaves out a response"),
        (RANKED | {"ranking": "AB > B"}, "ranks do not fit", "ranking: names a response twice, or one that is not"),
        (RANKED | {"ranking": ""}, "ranks do not fit", "ranking: names a response twice, or one that is not"),
        (RANKED | {"ranking": [True, 2]}, "wrong type", "ranking.0: is true, not a number"),
        (RANKED | {"responses": ["a", "a"], "ranking": [1, 1]}, "fewer than two responses", "has fewer than two"),
        (RANKED | {"responses": ["a", "a"]}, "equal responses", "says of the same response"),
        (RANKED | {"responses": '["a",'}, "not JSON", "responses: is a cell that is not JSON"),
        (
            {"prompt": "Q", "responses": ["a", "b"], "scores": [1, float("nan")]},
            "not finite",
            "scores.1: is nan",
        ),
        ({"prompt": "Q", "responses": ["a", "b"], "correct": [1, 0]}, "wrong type", "correct.0: is a number, not true"),
        (
            {"question": "Q", "6b": {"solution": "a", "is_correct": 1}},
            "wrong type",
            "6b.is_correct: is a number, not true",
        ),
        ({"question": "Q", "answer": "A"}, "missing field", "has no object with `solution`"),
        ({"prompt": "Q", "response_a": "a", "response_b": "b", "votes": []}, "no ranking", "votes: is empty"),
        (
            {"prompt": "Q", "response_a": "a", "response_b": "b", "votes": [{"choice": "c"}]},
            "unknown choice",
            "votes.0.choice: is 'c', not one of",
        ),
        (
            {"prompt": "Q", "response": "A"},
            "unknown shape",
            "the keys are prompt, response: it looks like `prompt-response`",
        ),
        (
            {"x": 1},
            "unknown shape",
            "the keys are x: no format has these, and `columns` can say which is which; the source's kind is rankings",
        ),
    ],
)
def test_a_damaged_row_is_refused_with_field_and_reason(row: dict[str, Any], reason: str, told: str) -> None:
    found, message = damage(row, "rankings")
    assert found == reason
    assert message.startswith(told)


def test_a_demonstration_ends_with_the_assistant() -> None:
    assert damage({"messages": TALK}, "demonstrations")[0] == "no response"
    assert one({"messages": TALK}, "prompts").prompt == TALK


def test_damage_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(Damaged("NUL", "prompt", "has a NUL character")))
    assert (error.reason, str(error)) == ("NUL", "prompt: has a NUL character")


def test_a_source_s_format_and_columns_are_checked() -> None:
    check_format("rankings", "auto", {"prompt": "question"})
    check_format("prompts", "pairs", {"prompt": "question"})
    with pytest.raises(UserError, match=r"`format: pears` is none of auto, tickets"):
        check_format("rankings", "pears", {})
    with pytest.raises(UserError, match=r"`format: alpaca` holds no rankings; these do: oasst, ranking"):
        check_format("rankings", "alpaca", {})
    with pytest.raises(UserError, match=r"`columns` maps promt, which is no name"):
        check_format("rankings", "pairs", {"promt": "question"})
