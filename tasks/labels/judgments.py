"""What people say of prompts and outputs: `data/labels/demonstrations.jsonl` and `rankings.jsonl`, one line a judgment.

A judgment names what it judged by content, so it goes with the sample wherever that stands, and with no other. Lines
are appended and never changed: of several by one labeler on one item the last one holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from tasks.conversations import Conversation, key_of
from tasks.datasets import Row

DEMONSTRATIONS = Path("data/labels/demonstrations.jsonl")
RANKINGS = Path("data/labels/rankings.jsonl")
GUIDELINES = Path("data/labels/guidelines.md")
SIMULATED = "simulated:"  # before a simulated labeler's id where it fills in for people: no report takes it for one

Flag = Literal["harmful", "broken", "not an answer"]
RESERVED = (SIMULATED, "majority of ", "Bradley-Terry of ")  # what the pipeline's own names begin with
LONGEST_NAME = 100  # characters; an e-mail address is a name
Rating = Annotated[int, Field(ge=1, le=7)]  # 7 is best (InstructGPT, appendix B.2)


class Judgment(Row):
    """What one labeler said of one item, or why nothing."""

    item: str  # item_id: what was judged
    prompt: Conversation
    labeler: str
    guidelines: str  # version_of: what the labeler was told to go by
    started_at: str  # when the item was shown, ISO 8601 in UTC
    ended_at: str  # when it was saved or skipped
    skipped: str | None  # why the labeler says nothing; None: it is labelled

    @field_validator("labeler")
    @classmethod
    def _a_person(cls, labeler: str) -> str:
        return labeler_name(labeler)

    @field_validator("started_at", "ended_at")
    @classmethod
    def _time(cls, time: str) -> str:
        if datetime.fromisoformat(time).tzinfo is None:
            raise ValueError(f"{time} does not say in which time zone it is")
        return time


class WrittenDemonstration(Judgment):
    response: str | None  # None where skipped

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.response is None) != (self.skipped is not None):
            raise ValueError("a demonstration has either a response or a reason why it was skipped")
        if self.item != item_id(self.prompt):
            raise ValueError("`item` is the name of another prompt")
        return self


class JudgedRanking(Judgment):
    """`ranks`, `flags` and `ratings` are of `responses` in that order, and empty where skipped."""

    responses: list[str]
    ended: list[bool]  # whether the response ended with the end token
    order: list[int]  # as shown: in place p stood responses[order[p]]
    seed: int  # of the draw of the order
    ranks: list[int]  # 1 is best, equal ranks are ties
    flags: list[list[Flag]]
    ratings: list[Rating | None]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        count = len(self.responses)
        if len(self.ended) != count or sorted(self.order) != list(range(count)):
            raise ValueError(f"`ended` and `order` do not go with the {count} responses")
        wanted = 0 if self.skipped is not None else count
        for name in ("ranks", "flags", "ratings"):
            if len(getattr(self, name)) != wanted:
                raise ValueError(f"`{name}` has {len(getattr(self, name))} entries, not {wanted}")
        if any(rank < 1 for rank in self.ranks):
            raise ValueError("a rank is 1 or more; 1 is best")
        if self.item != item_id(self.prompt, self.responses, self.ended):
            raise ValueError("`item` is the name of another prompt or other outputs")
        return self


AnyJudgment = TypeVar("AnyJudgment", bound=Judgment)


def labeler_name(name: str) -> str:
    """A person's name as labels bear it. ValueError where it is none."""
    name = name.strip()
    if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        raise ValueError(f"A name has 1 to {LONGEST_NAME} printable characters.")
    if name.startswith(RESERVED):
        raise ValueError(f"`{name}`: names that begin so are the pipeline's own.")
    return name


def item_id(prompt: Conversation, responses: Sequence[str] = (), ended: Sequence[bool] = ()) -> str:
    """The name of a prompt with these outputs, in whichever order they stand."""
    outputs = sorted(zip(responses, ended, strict=True))
    return hashlib.sha256(json.dumps([key_of(prompt), outputs], ensure_ascii=False).encode()).hexdigest()[:16]


def standing(judgments: Iterable[AnyJudgment], leave_out: Iterable[str] = ()) -> list[AnyJudgment]:
    """The judgments that hold: of each labeler on each item the last, without those of labelers who are left out."""
    without = set(leave_out)
    last = {(row.item, row.labeler): row for row in judgments if row.labeler not in without}
    return list(last.values())


def seconds_of(row: Judgment) -> float:
    """How long the labeler had the item before them."""
    return (datetime.fromisoformat(row.ended_at) - datetime.fromisoformat(row.started_at)).total_seconds()


def version_of(guidelines: str) -> str:
    """The version of the guidelines: the same text has the same."""
    return hashlib.sha256(guidelines.encode()).hexdigest()[:12]
