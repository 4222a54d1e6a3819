"""The rows that stages hand to each other, and reading and writing them as JSON Lines.

One line is one row. A row that is torn or has the wrong fields is an error that names file, line and field.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from tasks.conversations import Conversation, key_of, single
from tasks.stage import UserError


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Ticket(Row):
    """The facts behind a customer-support ticket. Labelers and the gold score see them; models see the prompt alone."""

    kind: str  # the kind of problem
    customer: str
    order: str
    item: str
    problem: str
    remedy: str  # what the shop offers
    deadline: str
    signer: str


class RawTicket(Row):
    prompt: str
    ticket: Ticket


class PromptFacts(Row):
    """What is known of one prepared prompt beside its text."""

    id: str
    source: str  # where it came from, as the reports call it
    ticket: Ticket | None  # None: no simulated labeler can answer it and no gold score judges answers to it


class Prompt(Row):
    id: str  # prompt_id(prompt)
    prompt: Conversation


class Demonstration(Row):
    id: str
    prompt: Conversation
    response: str
    labeler: str


class Samples(Row):
    """K outputs of the SFT model for one prompt, in the order in which they were sampled."""

    id: str
    prompt: Conversation
    responses: list[str]
    ended: list[bool]  # whether the response ended with the end token


class RecordedRanking(Row):
    """One labeler's ranking of K responses to one prompt, as it came with the raw data."""

    id: str
    prompt: Conversation
    responses: list[str]
    ranks: list[int]  # of each response; 1 is best, equal ranks are ties
    labeler: str


class Ranking(RecordedRanking):
    """The same with what reward training must know; the responses may be the SFT model's outputs."""

    ended: list[bool]  # whether the response ended with the end token
    held_out: bool  # kept out of reward training, to measure accuracy on


class Vote(Ranking):
    """A person's choice between two models' answers, made without knowing which model gave which (tasks/arena.py)."""

    models: list[str]  # that gave the responses: policy/3, or a folder with the start of its DVC hash
    seed: int  # of the draw of their sides
    shown_at: str  # when both answers were complete, ISO 8601

    @field_validator("prompt", mode="before")
    @classmethod
    def _of_text(cls, prompt: Any) -> Any:
        """Votes that were recorded when a prompt was a text keep their worth."""
        return single(prompt) if isinstance(prompt, str) else prompt


class Answer(Row):
    """What a model answered to a held-out prompt, and what the other models say of it."""

    id: str
    prompt: Conversation
    response: str
    length: int  # tokens, with the end token
    ended: bool  # whether it ends with the end token
    score: float  # the reward model's, centred
    base_logprob: float  # log-probability of the answer under the base model, nats
    kl: float | None  # of the policy's: log pi(answer) - log pi_sft(answer), nats


class HeldOutAnswer(Row):
    """The policy's answer during PPO, to a prompt that it is not trained on."""

    update: int  # how many updates had been made
    id: str
    prompt: Conversation
    response: str
    tokens: list[int]  # as the policy wrote them, with the end token where there is one: the text may encode to others
    score: float  # the reward model's, centred
    kl: float  # log pi(answer) - log pi_sft(answer), nats


class SideBySide(Row):
    """A held-out prompt answered by three models, with what the judges say of each answer: {"gold.sft": 0.7, ...}."""

    prompt: str  # text_of the conversation
    base: str
    sft: str
    policy: str
    scores: dict[str, float]


class Verdict(Row):
    """What a judge says of two answers to one prompt, which it was shown in both orders."""

    kind: Literal[
        "labelled", "sft", "base"
    ]  # a labeler finds `first` better; or it is the policy's, and the other this
    prompt: str  # text_of the conversation
    first: str
    second: str
    answers: list[str]  # to (first, second), then to (second, first); none where the two are the same text
    verdict: Literal["first", "second", "tie", "unreadable"]


AnyRow = TypeVar("AnyRow", bound=Row)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"gold": {"sft": 1}} -> {"gold.sft": 1}"""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def prompt_id(prompt: Conversation) -> str:
    """The prompt's name: the same turns have the same id everywhere."""
    return hashlib.sha256(key_of(prompt).encode()).hexdigest()[:16]


def stable_share(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone, evenly spread: to split, order and assign rows by, so that a
    row's place does not depend on which other rows there are."""
    digest = hashlib.sha256("|".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def read_rows(path: Path, row_type: type[AnyRow], *, may_be_empty: bool = False) -> list[AnyRow]:
    """All rows of a JSON Lines file; UserError names file, line and field of the first that is wrong."""
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007
                rows.append(row_type.model_validate_json(line))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "the line"
        raise UserError(
            f"{path}, line {number}: {field}: {problem['msg']}. The file is damaged or not what this stage reads."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    if not rows and not may_be_empty:
        raise UserError(f"{path} holds no rows.")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON Lines; the parent folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row.model_dump(), ensure_ascii=False) + "\n")


def write_json(path: Path, content: object) -> None:
    """Write one JSON document, readable and the same bytes for the same content; the parent folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_figures(path: Path, figures: Mapping[str, Any], shown: Sequence[str], intervals: Sequence[str] = ()) -> None:
    """A stage's report: all figures for programs, and on top those of them that DVC shows to people.

    shown, intervals: dotted names; of those in `intervals` DVC shows the interval too. DVC makes a column of every
    number in a metrics file but for those in a list, so all figures stand in one. In a file that is no metric they
    would keep the stage out of DVC's run cache.
    """
    known = {name: value for name, value in flat(figures).items() if value is not None}
    on_top = {name: rounded(known[name]) for name in shown if name in known}
    on_top |= {name: format_interval(known, name) for name in intervals if name in known}
    write_json(path, {**on_top, "figures": [figures]})


def read_figures(text: str) -> dict[str, Any]:
    """All figures of a report. One of an older commit holds nothing else."""
    report: dict[str, Any] = json.loads(text)
    figures: dict[str, Any] = report["figures"][0] if "figures" in report else report
    return figures


def rounded(value: Any) -> Any:
    """A float as people read it."""
    return float(f"{value:.4g}") if isinstance(value, float) and not value.is_integer() else value


def format_interval(figures: Mapping[str, Any], name: str) -> Any:
    """`0.202 [0.163, 0.24]`; the figure alone where `figures` has no interval of it."""
    value, low, high = (figures.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if low is None or high is None:
        return rounded(value)
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a table for `dvc plots`; a cell that a row lacks is empty; the parent folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
