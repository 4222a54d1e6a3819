"""Damaged rows and files end in rows, a Damaged or a UserError: never in another exception, never in a hang.

`python -m tests.tasks.prepare.test_fuzz 100000` does the same with more, a tenth of it files.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.params import Kind
from tasks.prepare.formats import FORMATS, Damaged, Example, check_format, examples_of
from tasks.prepare.sources import parse, rows_of
from tasks.stage import UserError

KINDS: tuple[Kind, ...] = get_args(Kind)
LIMIT_S = 5.0  # of one row or file
JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 1e300, 10**30, float("nan"), float("inf"), "", " \n", "\0", "a\0b", "\ud800"),
    *("system", "user", "A > B", "B = A", "A > ", "[1, 2]", "[", "{", '{"role": "user"}', "x" * 5000, "e\u0301"),
    *(
        [],
        [[]],
        [1, 1],
        [0, 1],
        [[1], [0]],
        [[0, 1]],
        [True, False],
        [None],
        ["a", "a"],
        {},
        {"": {}},
        b"bytes",
        (1, 2),
    ),
    *({"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}, {"solution": "a", "is_correct": 1}),
]
SCRAPS = (
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\\ud800",
        b"\\u0000",
        b"NaN",
        b"-Infinity",
        b"1e999",
    ),
    *(
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\r",
        b"\\",
        b"[" * 3000,
        b'{"a":' * 1500,
        b"9" * 6000,
        b"\x1f\x8b",
    ),
    *(b"version https://git-lfs", b"<html>", b'"prompt": "again", ', b"\n\n\n", b"true", b"null"),
)
ENDINGS = ("jsonl", "json", "csv", "jsonl.gz", "json.zst", "csv.gz", "jsonl.zst", "parquet")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(example: Example, kind: Kind) -> None:
    roles = [turn["role"] for turn in example.prompt if turn["role"] != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    for text in [turn["content"] for turn in example.prompt] + example.responses:
        assert text
        assert text == text.strip()
        assert "\0" not in text
        text.encode()
    if kind == "rankings":
        assert len(set(example.responses)) > 1
        assert len(example.ranks) == len(example.responses)
        assert set(example.ranks) == set(range(1, max(example.ranks) + 1))
    else:
        assert len(example.responses) == (kind == "demonstrations")
        assert not example.ranks


def outcome(row: bytes | dict[str, Any] | Any, rng: random.Random) -> str:
    """What becomes of a row: "taken" or the reason why not."""
    kind = rng.choice(KINDS)
    format = "auto" if rng.random() < 0.7 else rng.choice(list(FORMATS))
    columns = {"prompt": rng.choice(("question", "prompt.0.content", "a.b"))} if rng.random() < 0.1 else {}
    try:
        check_format(kind, format, {})
        if isinstance(row, Damaged):
            raise row
        if isinstance(row, bytes):
            row = parse(row)
        for example in examples_of(row, kind, format, columns):
            check(example, kind)
    except Damaged as error:
        return error.reason
    except UserError:
        return "format refused"
    return "taken"


def holders(value: Any) -> list[Any]:
    """All lists and objects within a row, itself first."""
    children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    found = [value] if isinstance(value, dict | list) and value else []
    return found + [holder for child in children for holder in holders(child)]


def damaged_row(rng: random.Random) -> dict[str, Any]:
    """A row of some format in which one to three values are others, gone, or stand twice."""
    row: dict[str, Any] = copy.deepcopy(dict(rng.choice(list(FORMATS.values())).example))
    for _ in range(rng.randint(1, 3)):
        if not row:
            break
        holder = rng.choice(holders(row))
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match rng.randrange(4):
            case 0 | 1:
                holder[key] = copy.deepcopy(rng.choice(JUNK))
            case 2:
                del holder[key]
            case _ if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            case _:
                holder[rng.choice(("prompt", "response", "chosen", "system", "user", "messages"))] = holder[key]
    return row


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to three times a byte is another, a stretch is gone or stands twice, a scrap is put in."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(content))
        match rng.randrange(5):
            case 0:
                content = content[:at] + rng.randbytes(1) + content[at + 1 :]
            case 1:
                content = content[:at] + content[at + rng.randint(1, 40) :]
            case 2:
                content = content[:at]
            case 3:
                content = content[:at] + content[at - 30 :]
            case _:
                content = content[:at] + rng.choice(SCRAPS) + content[at:]
    return content


def whole_file(ending: str, rng: random.Random) -> bytes:
    rows = [dict(rng.choice(list(FORMATS.values())).example) for _ in range(rng.randint(1, 20))]
    match ending.split(".", maxsplit=1)[0]:
        case "json":
            content = json.dumps(rows, indent=rng.choice((None, 2))).encode()
        case "jsonl":
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        case "csv":
            file = io.StringIO()
            writer = csv.DictWriter(file, list(rows[0]), extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()}
                )
            content = file.getvalue().encode()
        case _:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows[:1] * len(rows)), sink)
            return bytes(sink.getvalue())
    if ending.endswith(("gz", "zst")):
        if rng.random() < 0.5:
            content = damaged_bytes(content, rng)
        packed: bytes = pa.compress(content, codec="gzip" if ending.endswith("gz") else "zstd", asbytes=True)
        return packed
    return content


def fuzz_rows(count: int, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    for _ in range(count):
        row: Any = damaged_row(rng)
        if rng.random() < 0.5:
            row = damaged_bytes(json.dumps(row, default=str).encode(), rng)
        with time_limit(LIMIT_S):
            found[outcome(row, rng)] += 1
    return found


def fuzz_files(count: int, seed: int, folder: Path) -> Counter[str]:
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    for _ in range(count):
        ending = rng.choice(ENDINGS)
        path = folder / f"data.{ending}"
        path.write_bytes(damaged_bytes(whole_file(ending, rng), rng))
        with time_limit(LIMIT_S):
            try:
                for _, row in rows_of(path):
                    found[f"row {outcome(row, rng)}"] += 1
                found["file read"] += 1
            except UserError as error:
                found["file refused" if str(path) in str(error) else "file refused without its name"] += 1
    return found


def test_damaged_rows_are_taken_or_refused_with_a_reason() -> None:
    found = fuzz_rows(5000, seed=1)
    assert found["taken"] > 200
    assert {"not JSON", "wrong type", "missing field", "empty text", "NUL", "lone surrogate", "not UTF-8"} <= set(found)
    assert {"unknown shape", "unknown role", "not finite", "too deep", "ranks do not fit"} <= set(found)


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    found = fuzz_files(300, seed=2, folder=tmp_path)
    assert found["file read"] > 30
    assert found["file refused"] > 30
    assert not found["file refused without its name"]
    assert found["row taken"] > 100


if __name__ == "__main__":
    total, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz_rows(total - total // 10, seed) + fuzz_files(total // 10, seed, Path(folder))
    print(f"{total} cases in {time.monotonic() - began:.0f} s")
    for name, count in counts.most_common():
        print(f"{count:8} {name}")
