"""The formats in which people keep demonstrations, rankings and prompts, and how each becomes one schema.

A format is recognised by the row's keys: the first of FORMATS that holds rows of the source's kind and whose keys the
row has. A key whose value is null counts as absent, unless nothing fits without it. Keys that no format names are
left unread.

Of every text line ends become \\n, Unicode becomes NFC, and white space at both ends is taken off. A conversation may
begin with one system turn; then user and assistant take turns, the user first. Two turns of one role in a row are
refused rather than joined, since nobody wrote the joined text. An empty system turn says nothing and is left out.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
from pydantic import ValidationError

from tasks.conversations import Conversation, Role, Turn, key_of, single
from tasks.datasets import Ticket
from tasks.params import Kind
from tasks.stage import UserError

Row = Mapping[str, Any]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
USERS = ("user", "user_id", "group")
LABELERS = ("labeler", "annotator", "worker")
OPTIONAL = frozenset({"system", "input", "history", *USERS, *LABELERS})
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
WHOLE = re.compile(r"[0-9]+\.0")
SHOWN = {None: "null", True: "true", False: "false"}
TYPES: dict[type, str] = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
PLACES = {letter: place for place, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ")}


class Damaged(Exception):
    """One row that cannot be taken. `reason` is a short slug to count by, `field` a dotted path, "" for the row;
    `tokens` of prompt and longest response, where they are too many."""

    def __init__(self, reason: str, field: str, problem: str, tokens: tuple[int, int] | None = None) -> None:
        super().__init__(reason, field, problem, tokens)  # all of them, so that a worker process can hand it over
        self.reason = reason
        self.field = field
        self.problem = problem
        self.tokens = tokens

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" if self.field else self.problem


class Example(NamedTuple):
    prompt: Conversation  # ends with a user turn
    responses: list[str]  # demonstrations: one; rankings: two or more; prompts: none
    ranks: list[int]  # rankings: of each response, dense, 1 is best, equal ranks are ties
    labeler: str | None = None
    user: str | None = None  # whom or what group of rows it belongs to
    ticket: Mapping[str, Any] | None = None  # a tasks.datasets.Ticket


class Format(NamedTuple):
    kinds: tuple[Kind, ...]  # what its rows are; the prompts of all but `tickets` and `prompts` can be taken too
    shapes: tuple[frozenset[str], ...]  # all keys of one of these
    read: Callable[[Row, Kind], list[Example]]
    example: Row


def examples_of(row: Row, kind: Kind, format: str, columns: Mapping[str, str]) -> list[Example]:
    """All examples of one row. `columns`: {the format's name: the data's name, dotted where nested}.

    Damaged names the field as the data do.
    """
    try:
        if columns:
            row = renamed(row, columns)
        name = recognised(row, kind) if format == "auto" else format
        examples = FORMATS[name].read(row, kind)
    except Damaged as error:
        head, dot, rest = error.field.partition(".")
        raise Damaged(error.reason, columns.get(head, head) + dot + rest, error.problem) from None
    if kind != "prompts":
        return examples
    prompts = {key_of(each.prompt): each for each in examples}
    return [each._replace(responses=[], ranks=[], labeler=None) for each in prompts.values()]


def check_format(kind: Kind, format: str, columns: Mapping[str, str]) -> None:
    """UserError where a source's `format` or `columns` can fit no row."""
    if format != "auto" and format not in FORMATS:
        raise UserError(f"`format: {format}` is none of auto, {', '.join(FORMATS)}.")
    fitting = [name for name, each in FORMATS.items() if kind == "prompts" or kind in each.kinds]
    if format not in ("auto", *fitting):
        raise UserError(f"`format: {format}` holds no {kind}; these do: {', '.join(fitting)}.")
    chosen = fitting if format == "auto" else [format]
    known = OPTIONAL.union(*(shape for name in chosen for shape in FORMATS[name].shapes))
    unknown = sorted(set(columns) - known)
    if unknown:
        raise UserError(
            f"`columns` maps {', '.join(unknown)}, which is no name of the format; it is written "
            f"{{the format's name: the data's name}}, with the names {', '.join(sorted(known))}."
        )


def recognised(row: Row, kind: Kind) -> str:
    """The name of the row's format."""
    keys = frozenset(row)
    if None in row.values():
        filled = frozenset(key for key, value in row.items() if value is not None)
        name = first_fitting(filled, kind) or first_fitting(keys, kind)
    else:
        name = first_fitting(keys, kind)
    if name is not None:
        return name
    other = next((name for name in FORMATS if any(shape <= keys for shape in FORMATS[name].shapes)), None)
    hint = (
        f"it looks like `{other}`, which holds {' and '.join(FORMATS[other].kinds)}"
        if other
        else "no format has these, and `columns` can say which is which"
    )
    shown = ", ".join(str(key)[:40] for key in list(row)[:10]) or "no keys"
    raise Damaged("unknown shape", "", f"the keys are {shown}: {hint}; the source's kind is {kind}")


@lru_cache(maxsize=10_000)
def first_fitting(keys: frozenset[str], kind: Kind) -> str | None:
    for name, each in FORMATS.items():
        if (kind == "prompts" or kind in each.kinds) and any(shape <= keys for shape in each.shapes):
            return name
    return None


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with the format's names."""
    gone = {*columns, *columns.values()}
    result = {key: value for key, value in row.items() if key not in gone}
    for name, path in columns.items():
        holder: Any = row
        parts = [path] if path in row else path.split(".")
        for part in parts:
            if isinstance(holder, list) and part.isdecimal() and int(part) < len(holder):
                holder = holder[int(part)]
            elif isinstance(holder, Mapping) and part in holder:
                holder = holder[part]
            else:
                break
        else:
            result[name] = holder
    return result


# Fields


def needed(row: Row, name: str, field: str = "") -> Any:
    try:
        return row[name]
    except KeyError:
        raise Damaged("missing field", field or name, "is missing") from None


def wrong_type(value: object, field: str, wanted: str) -> Damaged:
    shown = SHOWN.get(value) if value is None or isinstance(value, bool) else TYPES.get(type(value))
    return Damaged("wrong type", field, f"is {shown or type(value).__name__}, not {wanted}")


def text(value: Any, field: str) -> str:
    """A text as all stages see it: NFC, \\n, nothing but text at its ends."""
    if not isinstance(value, str):
        raise wrong_type(value, field, "text")
    found: str = value
    if not found.isascii():
        try:
            found.encode()
        except UnicodeEncodeError:
            raise Damaged("lone surrogate", field, "has half a character (a lone surrogate)") from None
        found = unicodedata.normalize("NFC", found)
    if "\0" in found:
        raise Damaged("NUL", field, "has a NUL character")
    if "\r" in found:
        found = found.replace("\r\n", "\n")
    found = found.strip()
    if not found:
        raise Damaged("empty text", field, "is empty")
    return found


def filled(row: Row, name: str) -> str | None:
    """An optional text; None where the row lacks it or it is blank."""
    value = row.get(name)
    return None if value is None or (isinstance(value, str) and not value.strip()) else text(value, name)


def name_of(row: Row, names: Sequence[str]) -> str | None:
    """Who: the first of the fields that is filled. 17.0 is 17, which pandas writes so where a column has gaps."""
    for name in names:
        value = row.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if value is not None and (found := filled(row, name)):
            return found.removesuffix(".0") if WHOLE.fullmatch(found) else found
    return None


def listed(value: Any, field: str) -> list[Any]:
    """A list, or the cell of a table that holds one as JSON."""
    value = from_cell(value, field, "[")
    if not isinstance(value, list):
        raise wrong_type(value, field, "a list")
    return value


def mapped(value: Any, field: str) -> Mapping[str, Any]:
    """An object, or the cell of a table that holds one as JSON."""
    value = from_cell(value, field, "{")
    if not isinstance(value, Mapping):
        raise wrong_type(value, field, "an object")
    return value


def from_cell(value: Any, field: str, opening: str) -> Any:
    if not isinstance(value, str) or not value.lstrip().startswith(opening):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise Damaged("not JSON", field, f"is a cell that is not JSON ({error})") from None


def unpacked(value: Any) -> Any:
    """The list of messages that a table's cell holds as JSON; any other value as it is.

    A text may be about JSON, so only one that is JSON and has messages is taken for them.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
    if not all(isinstance(each, dict) for each in found):
        return value
    return (
        found
        if any({"role", "content"} <= each.keys() or {"from", "value"} <= each.keys() for each in found)
        else value
    )


def message(value: Any, field: str) -> Turn | None:
    """{"role", "content"} or {"from", "value"}; None: an empty system turn."""
    value = mapped(value, field)
    names = ("role", "content") if "role" in value else ("from", "value")
    said = value.get(names[1])
    if value.get(names[0]) == "system" and isinstance(said, str) and not said.strip():
        return None
    return turn(value, field, *names)


def turn(value: Row, field: str, speaker: str, content: str) -> Turn:
    role = needed(value, speaker, f"{field}.{speaker}")
    if not isinstance(role, str):
        raise wrong_type(role, f"{field}.{speaker}", "text")
    if role not in ROLES:
        raise Damaged("unknown role", f"{field}.{speaker}", f"is {role[:40]!a}, not one of {', '.join(ROLES)}")
    said = needed(value, content, f"{field}.{content}")
    return {"role": ROLES[role], "content": text(said, f"{field}.{content}")}


def system_turn(row: Row) -> Conversation:
    system = filled(row, "system")
    return [{"role": "system", "content": system}] if system else []


def turns(row: Row, name: str) -> Conversation:
    """A list of messages, after the row's system turn where it has one."""
    values = listed(needed(row, name), name)
    found = [said for i, value in enumerate(values) if (said := message(value, f"{name}.{i}"))]
    return alternating(system_turn(row) + found, name)


def alternating(conversation: Conversation, field: str) -> Conversation:
    """The same, if it holds system?, user, assistant, user ..."""
    said = conversation[1:] if conversation and conversation[0]["role"] == "system" else conversation
    if not said:
        raise Damaged("turns do not alternate", field, "has no turn of a user")
    for i, each in enumerate(said):
        wanted = "assistant" if i % 2 else "user"
        if each["role"] != wanted:
            problem = f"turn {i + 1} (without the system's) is the {each['role']}'s where the {wanted}'s is due"
            raise Damaged("turns do not alternate", field, problem)
    return conversation


def ending_with_user(conversation: Conversation, field: str) -> Conversation:
    if conversation[-1]["role"] != "user":
        raise Damaged(
            "prompt does not end with the user", field, "ends with the assistant's turn, where a prompt is due"
        )
    return conversation


def prompt_of(row: Row, name: str = "prompt") -> Conversation:
    """A text, a list of messages, or a transcript that ends with `Assistant:`."""
    value = unpacked(needed(row, name))
    if isinstance(value, list):
        return ending_with_user(turns(row, name), name)
    if isinstance(value, str) and value.startswith("\n\nHuman:") and value.rstrip().endswith("\n\nAssistant:"):
        return ending_with_user(system_turn(row) + transcript(value.rstrip().removesuffix("Assistant:"), name), name)
    return system_turn(row) + single(text(value, name))


def transcript(value: str, field: str) -> Conversation:
    """hh-rlhf's: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    before, *rest = SPEAKER.split("\n\n" + value.lstrip())
    if before.strip() or not rest:
        raise Damaged("not a transcript", field, "does not begin with `Human:`")
    said = zip(rest[::2], rest[1::2], strict=True)
    return alternating([{"role": HH_ROLES[who], "content": text(content, field)} for who, content in said], field)


def reply(value: Any, field: str) -> str:
    """A text, the assistant's message, or a list of that alone."""
    value = unpacked(value)
    if isinstance(value, list):
        if len(value) != 1:
            raise Damaged("not one reply", field, f"has {len(value)} messages where the assistant's alone is due")
        value, field = value[0], f"{field}.0"
    if not isinstance(value, Mapping):
        return text(value, field)
    said = message(value, field)
    if said is None or said["role"] != "assistant":
        raise Damaged("unknown role", field, "is not the assistant's turn")
    return said["content"]


# Rankings


def ranking(
    row: Row, prompt: Conversation, responses: list[str], ranks: list[int], labelers: Sequence[str] = LABELERS
) -> Example:
    if len(responses) != len(ranks):
        raise Damaged("ranks do not fit", "", f"has {len(responses)} responses and {len(ranks)} ranks")
    distinct = len(set(responses))
    if len(set(zip(responses, ranks, strict=True))) > distinct:
        raise Damaged("equal responses", "", "says of the same response that it is better than itself")
    if distinct < 2:
        raise Damaged("fewer than two responses", "", "has fewer than two different responses")
    return Example(prompt, responses, ranks, name_of(row, labelers), name_of(row, USERS))


def dense(values: Sequence[float]) -> list[int]:
    """[1, 5, 5, 9] -> [1, 2, 2, 3]"""
    places = {value: place for place, value in enumerate(sorted(set(values)), start=1)}
    return [places[value] for value in values]


def responses_of(row: Row) -> list[str]:
    return [reply(value, f"responses.{i}") for i, value in enumerate(listed(needed(row, "responses"), "responses"))]


def number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(value, field, "a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise Damaged("not finite", field, f"is {value}")
    return value


def numbers(values: list[Any], field: str) -> list[float]:
    return [number(value, f"{field}.{i}") for i, value in enumerate(values)]


def ranks_of(value: Any, count: int) -> list[int]:
    """Three ways to write that the fourth response is the best, then the third, then the first two alike:

    [3, 3, 2, 1]         each response's rank, 1 is best; gaps are closed
    [[3], [2], [0, 1]]   the responses' places from 0, best first, equals together
    "D > C > A = B"      their letters

    A flat list with a 0 might be either of the first two, and is refused.
    """
    value = from_cell(value, "ranking", "[")
    if isinstance(value, str):
        groups = [[PLACES.get(letter.strip(), -1) for letter in part.split("=")] for part in value.split(">")]
        return from_order(groups, count)
    values = listed(value, "ranking")
    if values and all(isinstance(group, list) for group in values):
        return from_order(values, count)
    if any(isinstance(each, list) for each in values):
        raise Damaged("ambiguous ranking", "ranking", "has places with and without brackets: write [[3], [2], [0, 1]]")
    if any(rank < 1 or rank != int(rank) for rank in numbers(values, "ranking")):
        problem = "has ranks that are no whole numbers from 1; an order is written [[3], [2], [0, 1]]"
        raise Damaged("ambiguous ranking", "ranking", problem)
    return dense(values)


def from_order(groups: list[list[Any]], count: int) -> list[int]:
    """Ranks from the responses' places in the order of their worth."""
    ranks: dict[float, int] = dict.fromkeys(range(count), 0)
    for rank, group in enumerate(groups, start=1):
        for place in numbers(group, f"ranking.{rank - 1}"):
            if ranks.get(place, rank):
                raise Damaged("ranks do not fit", "ranking", "names a response twice, or one that is not there")
            ranks[place] = rank
    if not all(ranks.values()):
        raise Damaged("ranks do not fit", "ranking", "leaves out a response")
    return dense(list(ranks.values()))


# Formats


def tickets(row: Row, kind: Kind) -> list[Example]:
    """Our default data: a prompt with the facts behind it, for which simulated labelers and a gold score exist."""
    try:
        ticket = Ticket.model_validate(mapped(needed(row, "ticket"), "ticket"))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in ("ticket", *problem["loc"]))
        raise Damaged("not a ticket", field, problem["msg"]) from None
    return [Example(prompt_of(row), [], [], user=name_of(row, USERS), ticket=ticket.model_dump())]


def prompts(row: Row, kind: Kind) -> list[Example]:
    """A text or a list of messages."""
    return [Example(prompt_of(row), [], [], user=name_of(row, USERS))]


def demonstration(row: Row, prompt: Conversation, response: str) -> Example:
    return Example(prompt, [response], [], labeler=name_of(row, LABELERS), user=name_of(row, USERS))


def prompt_response(row: Row, kind: Kind) -> list[Example]:
    """Texts, or messages as trl writes them: https://huggingface.co/docs/trl/dataset_formats."""
    name = "completion" if row.get("response") is None and "completion" in row else "response"
    return [demonstration(row, prompt_of(row), reply(needed(row, name), name))]


def alpaca(row: Row, kind: Kind) -> list[Example]:
    """Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca; `system` and `history`, a list of [instruction,
    output] said before, are LLaMA-Factory's, and so is the line end between instruction and input."""
    history = [listed(pair, f"history.{i}") for i, pair in enumerate(listed(row.get("history") or [], "history"))]
    before: Conversation = []
    for i, pair in enumerate(history):
        if len(pair) != 2:
            raise Damaged("wrong type", f"history.{i}", "is not a pair of instruction and output")
        before.append({"role": "user", "content": text(pair[0], f"history.{i}.0")})
        before.append({"role": "assistant", "content": text(pair[1], f"history.{i}.1")})
    instruction = text(needed(row, "instruction"), "instruction")
    given = filled(row, "input")
    prompt = system_turn(row) + before + single(f"{instruction}\n{given}" if given else instruction)
    return [demonstration(row, prompt, text(needed(row, "output"), "output"))]


def question_answer(row: Row, kind: Kind) -> list[Example]:
    """Cobbe et al. 2021, https://github.com/openai/grade-school-math."""
    return [demonstration(row, prompt_of(row, "question"), text(needed(row, "answer"), "answer"))]


def messages(row: Row, kind: Kind) -> list[Example]:
    """OpenAI's and trl's: {"role", "content"} turns, the last the demonstration."""
    return from_turns(row, "messages", kind)


def sharegpt(row: Row, kind: Kind) -> list[Example]:
    """ShareGPT's, as in https://github.com/lm-sys/FastChat: {"from", "value"} turns, the last the demonstration."""
    return from_turns(row, "conversations", kind)


def from_turns(row: Row, name: str, kind: Kind) -> list[Example]:
    conversation = turns(row, name)
    *before, last = conversation
    if last["role"] == "assistant":
        return [demonstration(row, before, last["content"])]
    if kind == "prompts":
        return [Example(conversation, [], [], user=name_of(row, USERS))]
    raise Damaged("no response", name, "ends with the user's turn, where the assistant's is the demonstration")


def ranked(row: Row, kind: Kind) -> list[Example]:
    """K responses and their order; see `ranks_of`."""
    responses = responses_of(row)
    return [ranking(row, prompt_of(row), responses, ranks_of(needed(row, "ranking"), len(responses)))]


def scored(row: Row, kind: Kind) -> list[Example]:
    """K responses with a score each: higher is better, equal is a tie."""
    scores = numbers(listed(needed(row, "scores"), "scores"), "scores")
    return [ranking(row, prompt_of(row), responses_of(row), dense([-score for score in scores]))]


def graded(row: Row, kind: Kind) -> list[Example]:
    """K responses, each right or wrong. All alike is a ranking of ties."""
    correct = {f"correct.{i}": value for i, value in enumerate(listed(needed(row, "correct"), "correct"))}
    return [ranking(row, prompt_of(row), responses_of(row), right_first(correct))]


def solutions(row: Row, kind: Kind) -> list[Example]:
    """example_model_solutions.jsonl of https://github.com/openai/grade-school-math: a question and, under any names,
    objects with `solution` and `is_correct`."""
    samples = {name: value for name, value in row.items() if isinstance(value, Mapping) and "is_correct" in value}
    if not samples:
        raise Damaged("missing field", "", "has no object with `solution` and `is_correct`")
    responses = [
        text(needed(sample, "solution", f"{name}.solution"), f"{name}.solution") for name, sample in samples.items()
    ]
    ranks = right_first({f"{name}.is_correct": sample["is_correct"] for name, sample in samples.items()})
    return [ranking(row, prompt_of(row, "question"), responses, ranks)]


def right_first(correct: Mapping[str, Any]) -> list[int]:
    """Ranks of {field: whether its response is right}."""
    for field, value in correct.items():
        if not isinstance(value, bool):
            raise wrong_type(value, field, "true or false")
    return dense([not value for value in correct.values()])


def pairs(row: Row, kind: Kind) -> list[Example]:
    """The better and the worse of two responses. Where those are whole conversations, as in
    https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized, they must go on from the prompt."""
    prompt = prompt_of(row)
    chosen, rejected = unpacked(needed(row, "chosen")), needed(row, "rejected")
    if isinstance(chosen, list) and len(chosen) > 1:
        (example,) = transcripts(row, kind)
        if example.prompt[-1] != prompt[-1]:
            raise Damaged("prompt differs", "prompt", "is not what `chosen` and `rejected` answer")
        return [example]
    return [pair(row, prompt, reply(chosen, "chosen"), reply(rejected, "rejected"))]


def pair(row: Row, prompt: Conversation, chosen: str, rejected: str) -> Example:
    if chosen == rejected:
        raise Damaged("equal responses", "", "has the same text as chosen and as rejected")
    return ranking(row, prompt, [chosen, rejected], [1, 2])


def transcripts(row: Row, kind: Kind) -> list[Example]:
    """Bai et al. 2022, https://github.com/anthropics/hh-rlhf: two whole conversations that differ in the last turn.

    Ones that differ before are refused: their last turns answer different prompts.
    """
    chosen, rejected = (conversation_of(row, name) for name in ("chosen", "rejected"))
    return [pair(row, common_prompt(chosen, rejected), chosen[-1]["content"], rejected[-1]["content"])]


def conversation_of(row: Row, name: str) -> Conversation:
    """A transcript or messages, up to an assistant's turn."""
    value = unpacked(needed(row, name))
    if isinstance(value, list):
        found = turns(row, name)
    else:
        whole = text(value, name)
        found = system_turn(row) + transcript(whole, name)
    if found[-1]["role"] != "assistant":
        raise Damaged("no response", name, "ends with the user's turn")
    return found


def common_prompt(first: Conversation, second: Conversation) -> Conversation:
    if first[:-1] != second[:-1]:
        raise Damaged("transcripts diverge before the last turn", "", "has two conversations with different prompts")
    return first[:-1]


def conversation_pairs(row: Row, kind: Kind) -> list[Example]:
    """A conversation and two replies, as in https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md."""
    name = "conversations" if row.get("conversations") is not None else "messages"
    prompt = ending_with_user(turns(row, name), name)
    return [pair(row, prompt, *(reply(needed(row, each), each) for each in ("chosen", "rejected")))]


def votes(row: Row, kind: Kind) -> list[Example]:
    """Several annotators' choices (a, b or tie) between two responses: one ranking of each."""
    prompt = prompt_of(row)
    responses = [reply(needed(row, name), name) for name in ("response_a", "response_b")]
    found = []
    for i, value in enumerate(listed(needed(row, "votes"), "votes")):
        vote = mapped(value, f"votes.{i}")
        ranks = choice(vote, "choice", f"votes.{i}.choice")
        found.append(ranking(row, prompt, responses, ranks)._replace(labeler=name_of(vote, LABELERS)))
    if not found:
        raise Damaged("no ranking", "votes", "is empty")
    return found


def arena(row: Row, kind: Kind) -> list[Example]:
    """Zheng et al. 2023, https://huggingface.co/datasets/lmsys/chatbot_arena_conversations: two answers to a prompt, or
    two conversations that differ in the last turn, and the winner."""
    ranks = choice(row, "winner", "winner")
    if row.get("conversation_a") is None:
        prompt = prompt_of(row)
        responses = [reply(needed(row, name), name) for name in ("response_a", "response_b")]
    else:
        first, second = (conversation_of(row, name) for name in ("conversation_a", "conversation_b"))
        prompt = common_prompt(first, second)
        responses = [first[-1]["content"], second[-1]["content"]]
    return [ranking(row, prompt, responses, ranks, (*LABELERS, "judge"))]


CHOICES = {
    "a": [1, 2],
    "model_a": [1, 2],
    "b": [2, 1],
    "model_b": [2, 1],
    "tie": [1, 1],
    "tie (bothbad)": [1, 1],
}


def choice(row: Row, name: str, field: str) -> list[int]:
    value = text(needed(row, name, field), field)
    if value not in CHOICES:
        raise Damaged("unknown choice", field, f"is {value[:40]!a}, not one of {', '.join(CHOICES)}")
    return CHOICES[value]


def oasst(row: Row, kind: Kind) -> list[Example]:
    """Köpf et al. 2023, https://github.com/LAION-AI/Open-Assistant: a tree of messages and their replies.

    Each prompter's message with its path from the root is a prompt; two or more ranked replies to it are a ranking
    (rank 0 is the best), and the best or only one is a demonstration. Messages that were deleted or failed the review
    are left out with all below them.
    """
    user = name_of(row, (*USERS, "message_tree_id"))
    found = []
    for path, replies in exchanges(mapped(needed(row, "prompt"), "prompt")):
        ranks = [reply.rank for reply in replies if reply.rank is not None]
        if kind == "prompts":
            found.append(Example(path, [], [], user=user))
        elif kind == "rankings" and len(ranks) > 1:
            texts = [reply.text for reply in replies if reply.rank is not None]
            found.append(ranking(row, path, texts, dense(ranks))._replace(user=user))
        elif kind == "demonstrations" and (ranks or len(replies) == 1):
            best = min(replies, key=lambda reply: math.inf if reply.rank is None else reply.rank)
            found.append(Example(path, [best.text], [], labeler=name_of(row, LABELERS), user=user))
    if not found:
        raise Damaged("no ranking" if kind == "rankings" else "no response", "", f"is a tree without {kind}")
    return found


class Reply(NamedTuple):
    text: str
    rank: float | None


def exchanges(root: Row) -> Iterator[tuple[Conversation, list[Reply]]]:
    """(path up to a prompter's message, the replies to it) of a tree, parents before children."""
    waiting = [(root, Conversation(), "prompt")] if kept(root) else []
    while waiting:
        node, before, field = waiting.pop()
        path = alternating([*before, turn(node, field, "role", "text")], field)
        children = listed(node.get("replies") or [], f"{field}.replies")
        fields = [f"{field}.replies.{i}" for i in range(len(children))]
        below = [(mapped(child, at), path, at) for child, at in zip(children, fields, strict=True)]
        below = [each for each in below if kept(each[0])]
        waiting += reversed(below)
        if path[-1]["role"] == "user":
            yield (
                path,
                [Reply(turn(child, at, "role", "text")["content"], rank_of(child, at)) for child, _, at in below],
            )


def kept(node: Row) -> bool:
    return node.get("deleted") is not True and node.get("review_result") is not False


def rank_of(node: Row, field: str) -> float | None:
    rank = node.get("rank")
    return None if rank is None else number(rank, f"{field}.rank")


def shape(*keys: str) -> frozenset[str]:
    return frozenset(keys)


SAID = "Where is my parcel?"
GOOD, FAIR, BAD = "It comes on Monday.", "It is on its way.", "No idea."
ASKED = {"role": "user", "content": SAID}
TICKET = {
    "kind": "late",
    "customer": "Maria",
    "order": "4821",
    "item": "lamp",
    "problem": "arrived late",
    "remedy": "a gift card",
    "deadline": "14 March",
    "signer": "Tom",
}
FORMATS: dict[str, Format] = {
    "tickets": Format(
        ("prompts",), (shape("prompt", "ticket"),), tickets, {"prompt": "Write to Maria about ...", "ticket": TICKET}
    ),
    "oasst": Format(
        ("rankings", "demonstrations"),
        (shape("message_tree_id", "prompt"),),
        oasst,
        {
            "message_tree_id": "054e1df3",
            "prompt": {
                "role": "prompter",
                "text": SAID,
                "replies": [
                    {"role": "assistant", "text": GOOD, "rank": 0, "replies": []},
                    {"role": "assistant", "text": BAD, "rank": 1, "replies": []},
                ],
            },
        },
    ),
    "ranking": Format(
        ("rankings",),
        (shape("prompt", "responses", "ranking"),),
        ranked,
        {"prompt": SAID, "responses": [BAD, GOOD, FAIR], "ranking": [3, 1, 2]},
    ),
    "scores": Format(
        ("rankings",),
        (shape("prompt", "responses", "scores"),),
        scored,
        {"prompt": SAID, "responses": [BAD, GOOD], "scores": [0.1, 0.9]},
    ),
    "graded": Format(
        ("rankings",),
        (shape("prompt", "responses", "correct"),),
        graded,
        {"prompt": "2 + 2?", "responses": ["4", "5", "four"], "correct": [True, False, True]},
    ),
    "votes": Format(
        ("rankings",),
        (shape("prompt", "response_a", "response_b", "votes"),),
        votes,
        {
            "prompt": SAID,
            "response_a": GOOD,
            "response_b": BAD,
            "votes": [{"annotator": "ann", "choice": "a"}, {"annotator": "bob", "choice": "tie"}],
        },
    ),
    "arena": Format(
        ("rankings",),
        (shape("prompt", "response_a", "response_b", "winner"), shape("conversation_a", "conversation_b", "winner")),
        arena,
        {"prompt": SAID, "response_a": GOOD, "response_b": BAD, "winner": "model_a"},
    ),
    "pairs": Format(
        ("rankings",),
        (shape("prompt", "chosen", "rejected"),),
        pairs,
        {"prompt": SAID, "chosen": GOOD, "rejected": BAD},
    ),
    "conversation-pairs": Format(
        ("rankings",),
        (shape("conversations", "chosen", "rejected"), shape("messages", "chosen", "rejected")),
        conversation_pairs,
        {
            "conversations": [{"from": "human", "value": SAID}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
    ),
    "transcripts": Format(
        ("rankings",),
        (shape("chosen", "rejected"),),
        transcripts,
        {
            "chosen": f"\n\nHuman: {SAID}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: {SAID}\n\nAssistant: {BAD}",
        },
    ),
    "prompt-response": Format(
        ("demonstrations",),
        (shape("prompt", "response"), shape("prompt", "completion")),
        prompt_response,
        {"prompt": SAID, "response": GOOD},
    ),
    "alpaca": Format(
        ("demonstrations",),
        (shape("instruction", "output"),),
        alpaca,
        {"instruction": "Answer the customer.", "input": SAID, "output": GOOD},
    ),
    "question-answer": Format(
        ("demonstrations",), (shape("question", "answer"),), question_answer, {"question": SAID, "answer": GOOD}
    ),
    "messages": Format(
        ("demonstrations",),
        (shape("messages"),),
        messages,
        {"messages": [ASKED, {"role": "assistant", "content": GOOD}]},
    ),
    "sharegpt": Format(
        ("demonstrations",),
        (shape("conversations"),),
        sharegpt,
        {"conversations": [{"from": "human", "value": SAID}, {"from": "gpt", "value": GOOD}]},
    ),
    "solutions": Format(
        ("rankings",),
        (shape("question"),),
        solutions,
        {
            "question": "2 + 2?",
            "6b": {"solution": "It is 5.", "is_correct": False},
            "175b": {"solution": "It is 4.", "is_correct": True},
        },
    ),
    "prompts": Format(("prompts",), (shape("prompt"),), prompts, {"prompt": [ASKED]}),
}
