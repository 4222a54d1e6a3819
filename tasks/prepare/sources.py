"""The rows of people's files, one after another in bounded memory, whatever the size of the file.

A file that is not what its name says is a UserError; a row that cannot be taken is a Damaged, and the next one follows.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.prepare.formats import Damaged
from tasks.stage import UserError

LONGEST_ROW = 10_000_000  # bytes
DEEPEST = 500  # objects and lists within each other
BLOCK = 1 << 20  # bytes read at a time
PARQUET_BATCH = 1024  # rows
CODECS = {".gz": "gzip", ".zst": "zstd"}
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
NOTES = re.compile(r".*\.(dvc|md)|(readme|licen[cs]e|notice|citation|changelog)(\..*)?", re.IGNORECASE)
SPACE = re.compile(r"[ \t\r\n]*")
SEPARATOR = re.compile(r"[ \t\r\n]*([,\]])")

NOT_UTF_8 = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"+/v": "UTF-7",
    b"\x84\x31\x95\x33": "GB 18030",
}
PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PAR1": "Parquet",
}

PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error", b"<body")
CONTROL = bytes(set(range(32)) - set(b"\t\n\f\r"))

Row = bytes | Mapping[str, Any] | Damaged


def files_of(path: Path) -> list[Path]:
    """The file itself, or all data files of a folder by their names; hidden files and notes are no data."""
    try:
        if path.is_dir():
            files = sorted(files_below(path, set()), key=lambda file: file.relative_to(path).as_posix())
        elif path.is_file() or path.is_symlink():
            files = [path]
        else:
            raise UserError(f"{path} is missing. Put the data there, or mend `data.sources` in params.yaml.")
        for file in files:
            check_file(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Mend its permissions.") from None
    unknown = [str(file) for file in files if ending(file) not in ENDINGS]
    if unknown:
        raise UserError(
            f"{', '.join(unknown[:10])}: of no known ending. Data files end in {', '.join(ENDINGS)}, all but the last "
            "also with .gz or .zst after it. Rename or remove them, or name a single file in `data.sources`."
        )
    if not files:
        raise UserError(f"{path} holds no data file ({', '.join(ENDINGS)}).")
    return files


def files_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Links are followed; each folder is taken once, so that none leads in a circle."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from files_below(path, seen)
        elif ending(path) in ENDINGS or not NOTES.fullmatch(path.name):
            yield path


def check_file(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a}: the name is not UTF-8. Rename it.") from None
    if path.is_file():
        return
    if path.is_symlink():
        raise UserError(
            f"{path} is a link to a file that is not there. Fetch it where it came from (`dvc pull`, `git annex get`), "
            "or remove the link."
        )
    raise UserError(f"{path} is no file but a pipe, socket or device. Remove it.")


def ending(path: Path) -> str:
    """Of the file's name without that of its compression; of Parquet with it, since it has a compression of its own."""
    name = path.name.lower()
    inner = Path(name).with_suffix("").suffix
    return inner if Path(name).suffix in CODECS and inner != ".parquet" else Path(name).suffix


def rows_of(path: Path) -> Iterator[tuple[int, Row]]:
    """(line or row from 1, row) of a file. Rows of JSON are bytes for `parse`, which workers call."""
    number = 0
    try:
        for number, row in READERS[ending(path)](path):
            yield number, row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last: a Parquet column's name
        raise UserError(
            f"{path} cannot be read to its end: {error}. It is cut off or damaged; fetch or write it again."
        ) from None
    if number == 0:
        raise UserError(f"{path} holds no rows.")


def unit_of(path: Path) -> str:
    """What `rows_of` counts in a file: "line" or "row"."""
    kind = ending(path)
    if kind == ".json":
        with opened(path) as stream:
            return "row" if is_array(stream) else "line"
    return "row" if kind == ".parquet" else "line"


def parse(content: bytes) -> Mapping[str, Any]:
    """One row of JSON. A key that stands twice in an object is damage, since a value would be lost."""
    try:
        row = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise damage(content, error) from None
    if not isinstance(row, dict):
        raise Damaged("not an object", "", "is JSON, but no object with keys")
    refuse_double_keys(content)
    return row


def is_too_deep(content: bytes) -> bool:
    """Counted, since Python's reader gives up at a depth that depends on its version."""
    if content.count(b"[") + content.count(b"{") <= DEEPEST:
        return False
    brackets = re.findall(rb"[\[\]{}]", re.sub(rb'"(?:\\.|[^"\\])*+"', b"", content))
    return max(accumulate((1 if bracket in b"[{" else -1 for bracket in brackets), initial=0)) > DEEPEST


def damage(content: bytes, error: orjson.JSONDecodeError) -> Damaged:
    """Why orjson refuses a row."""
    if is_too_deep(content):
        return Damaged("too deep", "", "is nested too deeply")
    try:
        json.loads(content.decode(), parse_int=float)  # int refuses what is thousands of digits long
    except UnicodeDecodeError as wrong:
        return Damaged("not UTF-8", "", f"is not UTF-8 ({wrong.reason} at byte {wrong.start})")
    except json.JSONDecodeError:
        return Damaged("NUL" if b"\0" in content else "not JSON", "", f"is not JSON: {error}")
    # Python's reader takes what the standard does not have
    if "surrogate" in str(error):
        return Damaged("lone surrogate", "", "has half a character (a lone surrogate)")
    return Damaged("not finite", "", "has a number that is NaN or infinite")


def refuse_double_keys(content: bytes) -> None:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise Damaged("key twice", next(name for name in names if names.count(name) > 1), "stands there twice")
        return found

    if is_too_deep(content):
        raise Damaged("too deep", "", "is nested too deeply")
    json.loads(content, object_pairs_hook=once, parse_int=float)


# Readers of one kind of file


def json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with opened(path) as stream:
        yield from lines(stream)


def json_file(path: Path) -> Iterator[tuple[int, Row]]:
    """An array of rows, or JSON Lines under another name."""
    with opened(path) as stream:
        if is_array(stream):
            yield from enumerate(elements(stream, path), start=1)
            return
        for place, (number, row) in enumerate(lines(stream)):
            if place == 0 and isinstance(row, bytes):
                check_first_line(row, path)
            yield number, row


def is_array(stream: io.BufferedReader) -> bool:
    return stream.peek().lstrip().startswith(b"[")


def check_first_line(line: bytes, path: Path) -> None:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(
            f"{path} is neither a JSON array of rows nor JSON Lines: its first line is not JSON ({error}). "
            "Write the rows as one array, or one object a line."
        ) from None


def lines(stream: io.BufferedReader) -> Iterator[tuple[int, Row]]:
    """The lines that are not blank, with their numbers."""
    number = 0
    while line := stream.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            while line and not line.endswith(b"\n"):
                line = stream.readline(LONGEST_ROW)
            yield number, Damaged("too long line", "", f"is longer than {LONGEST_ROW} bytes")
        elif not line.isspace():
            yield number, line.rstrip(b"\r\n")


def elements(stream: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """The elements of a JSON array as they stand.

    Python's own reader finds where each ends, since it takes what `parse` then refuses for that row alone: ijson's
    stops at a NaN or a bad byte, and makes a question mark of a lone surrogate.
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # bad bytes come through as they are
    scan = json.JSONDecoder(strict=False, parse_int=float).raw_decode
    text = decode(stream.read(BLOCK)).lstrip()
    at, number = 1, 1  # after the bracket
    if text[at:].lstrip().startswith("]"):
        return
    while True:
        start = past_space(text, at)
        try:
            _, end = scan(text, start)
            separator = SEPARATOR.match(text, end)
            if separator is None:
                raise json.JSONDecodeError("`,` or `]` is due", text, end)
        except RecursionError:
            raise UserError(f"{path}, row {number}: nested too deeply. Take the row out.") from None
        except json.JSONDecodeError as error:
            more = stream.read(max(BLOCK, len(text) - at)) if len(text) - at <= LONGEST_ROW else b""
            if not more:
                raise UserError(
                    f"{path}, row {number}: the JSON array is cut off or torn here, or the row is longer than "
                    f"{LONGEST_ROW} characters ({error.msg}). Mend it, or fetch or write the file again."
                ) from None
            text, at = text[at:] + decode(more), 0
            continue
        yield text[start:end].encode("utf-8", "surrogateescape")
        at = separator.end()
        number += 1
        if separator[1] == "]":
            break
    while text:
        if past_space(text, at) < len(text):
            raise UserError(f"{path} goes on after the end of its JSON array. Write all rows as one array.")
        text, at = decode(stream.read(BLOCK)), 0


def past_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def csv_file(path: Path) -> Iterator[tuple[int, Row]]:
    """(line on which the row begins, row). A blank line is no row."""
    csv.field_size_limit(LONGEST_ROW)  # its default refuses cells of 128 KiB
    with opened(path) as stream:
        reader = csv.reader(csv_lines(stream, path), strict=True)
        names = None
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if names is None or reader.line_num > start:
                    raise UserError(
                        f"{path}, lines {start} to {reader.line_num}: not CSV ({error}). A quotation mark is not "
                        "closed, or stands within a cell and is not doubled. Mend it, or write the file again."
                    ) from None
                yield start, Damaged("not CSV", "", f"is not CSV ({error})")
                continue
            if cells is None:
                return
            if cells and names is None:
                names = header(cells, path)
            elif cells and names:
                yield start, csv_row(names, cells)


def csv_lines(stream: io.BufferedReader, path: Path) -> Iterator[str]:
    number = 0
    while line := stream.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise UserError(f"{path}, line {number}: longer than {LONGEST_ROW} bytes. Take it out.")
        yield line.decode("utf-8", "surrogateescape")  # so that a bad byte is its own row's damage


def header(cells: list[str], path: Path) -> list[str]:
    """The columns' names. The first may be empty: pandas writes its index so."""
    for name in cells[1:] if len(cells) > 1 else cells:
        if not name.strip() or len(name) > 100 or "\n" in name or name.lstrip("-").replace(".", "", 1).isdecimal():
            raise UserError(
                f"{path}: the first line is no header, {name[:40]!a} cannot be a column's name. Put the columns' names "
                "there."
            )
    doubled = sorted({name for name in cells if cells.count(name) > 1})
    if doubled:
        raise UserError(f"{path}: the column {', '.join(doubled)} stands there twice. Rename one of them.")
    return cells


def csv_row(names: list[str], cells: list[str]) -> Mapping[str, Any] | Damaged:
    if len(cells) != len(names):
        return Damaged("wrong number of cells", "", f"has {len(cells)} cells under {len(names)} columns")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return Damaged("not UTF-8", "", "is not UTF-8")
    return {name: cell for name, cell in zip(names, cells, strict=True) if name}


def parquet_file(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        check_start(file.read(BLOCK), path)
    number = 0
    with pq.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            raise UserError(f"{path} has two columns of one name. Rename one of them.")
        for batch in table.iter_batches(PARQUET_BATCH):
            for row in parquet_rows(batch):
                number += 1
                yield number, row


def parquet_rows(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any] | Damaged]:
    try:
        yield from batch.to_pylist()
    except (
        ValueError,
        ArithmeticError,
        LookupError,
    ):  # bad UTF-8, a date out of range, an unknown time zone: which row?
        for i in range(batch.num_rows):
            yield parquet_row(batch.slice(i, 1))


def parquet_row(batch: pa.RecordBatch) -> Mapping[str, Any] | Damaged:
    try:
        row: Mapping[str, Any] = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError:
        return Damaged("not UTF-8", "", "is not UTF-8")
    except (ValueError, ArithmeticError, LookupError) as error:
        return Damaged("wrong type", "", f"has a value that Python has no type for ({error})")


READERS = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": csv_file,
    ".parquet": parquet_file,
}


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The text of a file, unpacked, after a byte order mark of UTF-8; UserError if it begins like something else."""
    with path.open("rb") as file:
        check_start(file.read(BLOCK), path)
    codec = CODECS.get(path.suffix.lower())
    # beside gzip it is three times as fast, and it reads zstd
    raw = pa.CompressedInputStream(pa.OSFile(str(path)), codec) if codec else path.open("rb", buffering=0)
    with io.BufferedReader(raw, BLOCK) as stream:
        start = stream.peek()
        check_start(start, path)
        check_text(start, path)
        if start.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        yield stream


def check_start(start: bytes, path: Path) -> None:
    if not start:
        raise UserError(f"{path} is empty. Fetch or write it again.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of git-LFS, not the data. Run `git lfs pull` where it came from.")
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:9].lower().startswith(PAGES):
        raise UserError(f"{path} is a web page or XML, probably a server's error. Fetch the data again.")


def check_text(start: bytes, path: Path) -> None:
    for mark, encoding in NOT_UTF_8.items():
        if start.startswith(mark):
            raise UserError(f"{path} is {encoding}. Write it again as UTF-8: `iconv -f {encoding} -t UTF-8`.")
    for mark, packing in PACKED.items():
        if start.startswith(mark):
            raise UserError(f"{path} is {packing}, which its name does not say. Rename or unpack it.")
    control = len(start) - len(start.translate(None, CONTROL))
    if control > 0.1 * len(start):
        raise UserError(
            f"{path} is no UTF-8 text but binary data, or UTF-16 without its mark. Write it again as UTF-8."
        )
