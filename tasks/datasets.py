"""The rows that stages hand to each other, and reading and writing them as JSON Lines.

One line is one row. A row that is torn or has the wrong fields is an error that names file, line and field.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

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


class PromptTicket(Row):
    """The facts of one prepared prompt."""

    id: str
    ticket: Ticket


class Prompt(Row):
    id: str  # prompt_id(prompt)
    prompt: str


class Demonstration(Row):
    id: str
    prompt: str
    response: str
    labeler: str


class Samples(Row):
    """K outputs of the SFT model for one prompt, in the order in which they were sampled."""

    id: str
    prompt: str
    responses: list[str]
    ended: list[bool]  # whether the response ended with the end token


class Ranking(Row):
    """One labeler's ranking of the K outputs for one prompt."""

    id: str
    prompt: str
    responses: list[str]
    ended: list[bool]
    ranks: list[int]  # of each response; 1 is best, equal ranks are ties
    labeler: str
    held_out: bool  # kept out of reward training, to measure accuracy on


class SideBySide(Row):
    """A held-out prompt answered by three models, with what the judges say of each answer: {"gold.sft": 0.7, ...}."""

    prompt: str
    base: str
    sft: str
    policy: str
    scores: dict[str, float]


AnyRow = TypeVar("AnyRow", bound=Row)


def prompt_id(prompt: str) -> str:
    """The prompt's name: the same text has the same id everywhere."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def stable_share(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone, evenly spread: to split, order and assign rows by, so that a
    row's place does not depend on which other rows there are."""
    digest = hashlib.sha256("|".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def read_rows(path: Path, row_type: type[AnyRow]) -> list[AnyRow]:
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
    if not rows:
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


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a table for `dvc plots`; a cell that a row lacks is empty; the parent folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
