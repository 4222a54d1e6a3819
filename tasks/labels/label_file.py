"""Files in data/labels that people's pages append to: a row is on the disk before anybody is told that it is saved."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from tasks.datasets import AnyRow, Row, read_rows
from tasks.stage import UserError


def append(row: Row, path: Path) -> None:
    """Append the row; it is on the disk when this returns."""
    append_all([row], path)


def append_all(rows: Sequence[Row], path: Path) -> None:
    """Append rows of one type; they are on the disk when this returns."""
    with locked(path) as file:
        mend(file, type(rows[0]))
        file.write(b"".join(map(line_of, rows)))
        file.flush()
        os.fsync(file.fileno())


def take_back(row: Row, path: Path) -> bool:
    """Remove the line that says this, whole or not at all. False: it is not there any more."""
    with locked(path) as file:
        file.seek(0)
        before, found, after = file.read().rpartition(line_of(row))
        if found:
            temporary = path.with_name(f".tmp-{path.name}")
            with temporary.open("wb") as rest:
                rest.write(before + after)
                rest.flush()
                os.fsync(rest.fileno())
            temporary.replace(path)
    return bool(found)


def line_of(row: Row) -> bytes:
    return (json.dumps(row.model_dump(), ensure_ascii=False) + "\n").encode()


def recorded(path: Path, row_type: type[AnyRow], otherwise: str = "") -> list[AnyRow]:
    """All rows so far; a file that is not there yet is made. UserError where it is damaged or cannot be written, which
    says what to do `otherwise`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path) as file:
            mend(file, row_type)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. {otherwise}".rstrip()) from error
    return read_rows(path, row_type, may_be_empty=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """The file at its end, for one writer at a time, be it a thread or another page."""
    while True:
        linked = is_linked(path)
        with path.open("rb" if linked else "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                continue  # git or DVC put another file there meanwhile: what is written here would be lost
            if linked or is_linked(path):
                own_copy(path)  # while no other writer is at it
                continue
            file.seek(0, os.SEEK_END)
            yield file
            return


def mend(file: IO[bytes], row_type: type[Row]) -> None:
    """A last line without its end is what a killed write left: nobody was told that this row is saved."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read() in (b"", b"\n"):
        return
    file.seek(0)
    content = file.read()
    torn = content[content.rfind(b"\n") + 1 :]
    try:
        row_type.model_validate_json(torn)
        file.write(b"\n")
    except ValidationError:
        print(f"note: {file.name} ended in a torn line, which was removed: {torn[:60]!r}", file=sys.stderr)
        file.truncate(len(content) - len(torn))
        file.seek(0, os.SEEK_END)


def is_linked(path: Path) -> bool:
    """Whether `dvc add` left a link into DVC's cache there: what is appended must not change the cache."""
    return path.is_symlink() or (path.exists() and path.stat().st_nlink > 1)


def own_copy(path: Path) -> None:
    """In place of a link, the same content; on the disk when this returns, as what was appended before was."""
    temporary = path.with_name(f".tmp-{path.name}")
    shutil.copyfile(path, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
