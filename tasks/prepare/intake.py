"""From a file's rows to tables: each row parsed, checked, masked and measured, or set aside with the reason.

What a row becomes depends on the row and the settings alone, so a file that has not changed is not read again: its
tables stay in a folder named by its content, the settings and this code.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from tasks import conversations, datasets
from tasks.conversations import Conversation
from tasks.datasets import prompt_id
from tasks.params import Kind
from tasks.prepare.duplicates import ENTRIES, signatures
from tasks.prepare.formats import Damaged, Example, examples_of
from tasks.prepare.masking import PersonalData, mask
from tasks.prepare.sources import parse

CHUNK_ROWS, CHUNK_BYTES = 4096, 4 * 2**20
POOL_BYTES = 16 * 2**20  # fewer are read before another process has started
LIBRARIES = ("datasets", "orjson", "phonenumbers", "pyarrow", "python-stdnum", "rensa", "tokenizers")
SHOWN = 100_000  # characters of a row that was set aside

EXAMPLES = pa.schema(
    {
        "row": pa.int64(),  # line or row number in the file, from 1
        "id": pa.uint64(),  # the prompt's id
        "content": pa.uint64(),  # the same for the same prompt, responses, ranks and labeler
        "user": pa.uint64(),  # 0: not known
        "prefix": pa.uint64(),  # of the prompt's first `common_prefix` characters; 0: it is shorter
        "prompt": pa.string(),  # the turns as JSON
        "responses": pa.list_(pa.string()),
        "response_keys": pa.list_(pa.uint64()),  # a hash of each
        "ranks": pa.list_(pa.int32()),
        "labeler": pa.string(),  # null: the row does not say
        "ticket": pa.string(),  # JSON, or null
        "prompt_tokens": pa.int32(),
        "response_tokens": pa.int32(),  # of the longest response, with the end token; 0 where there is none
        "pairs": pa.int32(),
        "tied_pairs": pa.int32(),
    }
)


@dataclass(frozen=True)
class Settings:
    """All that decides what becomes of a row."""

    kind: Kind
    format: str
    columns: Mapping[str, str]
    tokenizer: Path  # a tokenizer.json
    turn_tokens: int  # what the chat template puts around each turn after the first
    max_prompt_tokens: int
    max_response_tokens: int
    common_prefix: int | None
    mask: Sequence[PersonalData] = ()


class Taken(NamedTuple):
    """A chunk of rows, done."""

    examples: pa.Table
    ids: np.ndarray  # (P,) the distinct prompts
    signatures: np.ndarray  # (P, 128)
    damaged: list[dict[str, Any]]
    masked: Counter[str]
    rows: int


Raw = tuple[int, bytes | Mapping[str, Any] | Damaged]


def take(rows: Sequence[Raw], settings: Settings) -> Taken:
    """What a chunk of a file's rows becomes."""
    found: list[tuple[int, Example]] = []
    damaged: list[dict[str, Any]] = []
    masked: Counter[str] = Counter()
    for row, raw in rows:
        try:
            if isinstance(raw, Damaged):
                raise raw
            content = parse(raw) if isinstance(raw, bytes) else raw
            found += [(row, one) for one in examples_of(content, settings.kind, settings.format, settings.columns)]
        except Damaged as problem:
            damaged.append(set_aside(row, problem, raw, settings.mask))
    if settings.mask:
        clean = []
        for row, example in found:
            try:
                clean.append((row, masked_example(example, settings.mask, masked)))
            except Damaged as problem:
                damaged.append(set_aside(row, problem, example._asdict(), settings.mask))
        found = clean
    count = token_counts(settings.tokenizer, [text for _, example in found for text in texts_of(example)])
    taken: list[dict[str, Any]] = []
    prompts: dict[int, str] = {}
    for row, example in found:
        try:
            lengths = measured(example, count, settings)
        except Damaged as problem:
            damaged.append(set_aside(row, problem, example._asdict(), settings.mask))
            continue
        known = prompt_id(example.prompt)
        text = prompts.setdefault(int(known, 16), user_text(example.prompt))
        taken.append({"row": row, **hashes(example, known, text, settings.common_prefix), **lengths, **texts(example)})
    return Taken(
        pa.Table.from_pylist(taken, schema=EXAMPLES),
        np.fromiter(prompts, dtype=np.uint64, count=len(prompts)),
        signatures(list(prompts.values())),
        damaged,
        masked,
        len(rows),
    )


def set_aside(row: int, problem: Damaged, content: object, kinds: Sequence[PersonalData]) -> dict[str, Any]:
    """A row that cannot be taken, as the reports keep it; kinds: of personal data that are masked there too."""
    if isinstance(content, bytes):
        shown = content.decode("utf-8", "backslashreplace")
    else:
        shown = "" if isinstance(content, Damaged) else json.dumps(content, ensure_ascii=False, default=str)
    # a lone surrogate can be told, and not be written
    shown, _ = mask(shown[:SHOWN].encode("utf-8", "backslashreplace").decode(), kinds)
    message = str(problem).encode("utf-8", "backslashreplace").decode()
    tokens = dict(zip(("prompt_tokens", "response_tokens"), problem.tokens, strict=True)) if problem.tokens else {}
    return {
        "row": row,
        "reason": problem.reason,
        "field": problem.field,
        "message": message,
        **tokens,
        "content": shown,
    }


def measured(example: Example, count: Mapping[str, int], settings: Settings) -> dict[str, int]:
    """Lengths in tokens, and how many pairs are ranked. Damaged where a text is too long."""
    prompt = sum(count[turn["content"]] for turn in example.prompt) + settings.turn_tokens * (len(example.prompt) - 1)
    response = max((count[text] + 1 for text in example.responses), default=0)
    if prompt > settings.max_prompt_tokens:
        limit = f"text.max_prompt_tokens is {settings.max_prompt_tokens}"
        raise Damaged("prompt too long", "", f"the prompt has {prompt} tokens, and {limit}", (prompt, response))
    if response > settings.max_response_tokens:
        limit = f"text.max_response_tokens is {settings.max_response_tokens}"
        problem = f"a response has {response} tokens with its end, and {limit}"
        raise Damaged("response too long", "", problem, (prompt, response))
    pairs = len(example.ranks) * (len(example.ranks) - 1) // 2
    ties = sum(a == b for a, b in combinations(example.ranks, 2))
    return {"prompt_tokens": prompt, "response_tokens": response, "pairs": pairs, "tied_pairs": ties}


def hashes(example: Example, known: str, text: str, prefix: int | None) -> dict[str, Any]:
    """What tells rows apart, groups them and finds the same ones. known: the prompt's id; text: `user_text` of it."""
    order = sorted(zip(example.responses, example.ranks or [0] * len(example.responses), strict=True))
    return {
        "id": int(known, 16),
        "content": number_of([known, order, example.labeler]) if example.responses else int(known, 16),
        "user": number_of(example.user) if example.user else 0,
        "prefix": number_of(text[:prefix]) if prefix and len(text) > prefix else 0,
        "response_keys": [number_of(response) for response in example.responses],
    }


def texts(example: Example) -> dict[str, Any]:
    return {
        "prompt": orjson.dumps(example.prompt).decode(),
        "responses": example.responses,
        "ranks": example.ranks,
        "labeler": example.labeler,
        "ticket": orjson.dumps(example.ticket).decode() if example.ticket else None,
    }


def masked_example(example: Example, kinds: Sequence[PersonalData], counts: Counter[str]) -> Example:
    """Damaged where nothing else told two responses apart. A labeler who is called by such data gets another name."""

    def without(text: str) -> str:
        clean, found = mask(text, kinds)
        counts.update(found)
        return clean

    prompt: Conversation = [{"role": turn["role"], "content": without(turn["content"])} for turn in example.prompt]
    responses = [without(text) for text in example.responses]
    if len(set(responses)) < len(set(example.responses)):
        raise Damaged("same when masked", "", "two responses differ in masked personal data alone")
    labeler = example.labeler
    if labeler and without(labeler) != labeler:
        labeler = f"labeler-{number_of(labeler):016x}"
    ticket = {name: without(str(fact)) for name, fact in example.ticket.items()} if example.ticket else None
    return example._replace(prompt=prompt, responses=responses, labeler=labeler, ticket=ticket)


def texts_of(example: Example) -> Iterator[str]:
    yield from (turn["content"] for turn in example.prompt)
    yield from example.responses


def user_text(prompt: Conversation) -> str:
    """What prompts are compared by: the system's turns are often the same for all."""
    return "\n".join(turn["content"] for turn in prompt if turn["role"] != "system")


def number_of(content: object) -> int:
    """A hash in 64 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(orjson.dumps(content), digest_size=8).digest(), "big") or 1


@cache
def _tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_counts(file: Path, texts: Iterable[str]) -> dict[str, int]:
    """How many tokens each text has, without any that the tokenizer would put around it."""
    distinct = list(dict.fromkeys(texts))
    encoded = _tokenizer(file).encode_batch_fast(distinct, add_special_tokens=False)
    return dict(zip(distinct, map(len, encoded), strict=True))


# ---- a file ----


class Tables(NamedTuple):
    """What a file became, on disk: `examples.parquet`, `prompts.npz`, `damaged.jsonl`, `counts.json`."""

    folder: Path

    @property
    def examples(self) -> Path:
        return self.folder / "examples.parquet"

    def are_whole(self) -> bool:
        """What is torn, by a fault of the disk, is removed."""
        if not self.folder.exists():
            return False
        try:
            pq.read_metadata(self.examples)
            self.prompts(), self.counts()
        except (OSError, ValueError, EOFError, pa.ArrowException):
            shutil.rmtree(self.folder)
            return False
        return True

    def prompts(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids (P,), signatures (P, 128)) of the distinct prompts."""
        return np.load(self.folder / "ids.npy"), np.load(self.folder / "signatures.npy", mmap_mode="r")

    def damaged(self) -> Iterator[dict[str, Any]]:
        with (self.folder / "damaged.jsonl").open("rb") as lines:
            yield from map(orjson.loads, lines)

    def counts(self) -> dict[str, Any]:
        """{"rows": in the file, "masked": {kind: how many}}"""
        counts: dict[str, Any] = json.loads((self.folder / "counts.json").read_text(encoding="utf-8"))
        return counts


def key_of_file(name: str, digest: str, settings: Settings) -> str:
    """Names the tables of a file: by its ending and content, the settings, and the code that reads it. name: of the
    file, or of the data set of the hub with its split."""
    code = [Path(conversations.__file__), Path(datasets.__file__), *sorted(Path(__file__).parent.glob("*.py"))]
    chosen = {**asdict(settings), "tokenizer": file_digest(settings.tokenizer)}
    parts = [
        name if name.startswith("hub:") else Path(name).suffixes,
        digest,
        chosen,
        *map(file_digest, code),
        *map(version, LIBRARIES),
    ]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:24]


def file_digest(path: Path) -> str:
    """MD5, as DVC has it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def write_tables(
    rows: Iterable[Raw],
    settings: Settings,
    folder: Path,
    pool: ProcessPoolExecutor | None,
    progress: Callable[[int], object],
) -> Tables:
    """Read a file through; `progress` is told each chunk's size in bytes. The folder is there whole or not at all."""
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        fill(temporary, through(pool, settings, chunks(rows, progress)))
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        with suppress(OSError):  # another process has made them in the meantime
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Tables(folder)


def fill(folder: Path, chunks: Iterable[Taken]) -> None:
    known: dict[int, None] = {}
    ids, rest = [], []
    masked: Counter[str] = Counter()
    total = 0
    with (
        pq.ParquetWriter(folder / "examples.parquet", EXAMPLES, compression="zstd", compression_level=1) as examples,
        (folder / "damaged.jsonl").open("wb") as damaged,
    ):
        for taken in chunks:
            examples.write_table(taken.examples)
            damaged.writelines(orjson.dumps(one) + b"\n" for one in taken.damaged)
            new = np.array([id not in known for id in taken.ids.tolist()], dtype=bool)
            known.update(dict.fromkeys(taken.ids.tolist()))
            ids.append(taken.ids[new])
            rest.append(taken.signatures[new])
            masked.update(taken.masked)
            total += taken.rows
    np.save(folder / "ids.npy", np.concatenate(ids) if ids else np.empty(0, np.uint64))
    np.save(folder / "signatures.npy", np.concatenate(rest) if rest else np.empty((0, ENTRIES), np.uint32))
    (folder / "counts.json").write_text(json.dumps({"rows": total, "masked": masked}), encoding="utf-8")


def chunks(rows: Iterable[Raw], progress: Callable[[int], object]) -> Iterator[list[Raw]]:
    """Rows in lists that are worth handing to another process."""
    chunk: list[Raw] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += size_of(row[1])
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            progress(size)
            chunk, size = [], 0
    if chunk:
        yield chunk
        progress(size)


def size_of(row: bytes | Mapping[str, Any] | Damaged) -> int:
    """In bytes, about."""
    if isinstance(row, Mapping):
        return sum(len(str(value)) for value in row.values())
    return len(row) if isinstance(row, bytes) else 0


def through(pool: ProcessPoolExecutor | None, settings: Settings, chunks: Iterable[list[Raw]]) -> Iterator[Taken]:
    """Each chunk taken, in order; with a pool, some of them at once, but not all: memory stays bounded."""
    if pool is None:
        yield from (take(chunk, settings) for chunk in chunks)
        return
    waiting: deque[Future[Taken]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(take, chunk, settings))
        if len(waiting) > 2 * cores():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def worker_pool(size: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for so many bytes of raw data; none where starting them takes longer than the work."""
    if size < POOL_BYTES or cores() == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores(), context, initializer=_start_worker) as pool:
        yield pool


def cores() -> int:
    """That this process may use, and no more than are of use: one reads for all."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 8)


def _start_worker() -> None:
    from tasks.run import end_with_parent

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each core
    end_with_parent()
