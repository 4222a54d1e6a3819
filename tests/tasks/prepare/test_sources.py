"""Files as people have them, whole and damaged."""

from __future__ import annotations

import gzip
import json
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.prepare import sources
from tasks.prepare.formats import Damaged
from tasks.prepare.sources import files_of, parse, rows_of
from tasks.stage import UserError

ROWS: list[dict[str, Any]] = [{"prompt": f"Is it {i}?\nOr ü?", "response": "No."} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path: Path) -> list[tuple[int, Any]]:
    """The rows of a file, parsed; the reason in place of a damaged one."""
    found: list[tuple[int, Any]] = []
    for number, row in rows_of(path):
        try:
            if isinstance(row, Damaged):
                raise row
            found.append((number, parse(row) if isinstance(row, bytes) else row))
        except Damaged as error:
            found.append((number, error.reason))
    return found


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


File = Callable[[str, bytes], Path]


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # else the bytes carry the second


def zst(content: bytes) -> bytes:
    packed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return packed


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    return bytes(sink.getvalue())


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    return ("prompt,response\n" + "".join(f'"{row["prompt"]}",{row["response"]}\n' for row in rows)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.rstrip()),
        ("a.JSONL.GZ", gz(LINES)),
        ("a.jsonl.gz", gz(LINES[:50]) + gz(LINES[50:])),
        ("a.jsonl.zst", zst(LINES)),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n"),
        ("a.json.gz", gz(json.dumps(ROWS).encode())),
        ("a.parquet", parquet(ROWS)),
    ],
)
def test_rows_are_read_from_every_kind_of_file(file: File, name: str, content: bytes) -> None:
    assert read(file(name, content)) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("content", [csv_of(ROWS), b"\xef\xbb\xbf" + csv_of(ROWS)])
def test_csv_rows_have_the_number_of_their_first_line(file: File, content: bytes) -> None:
    assert read(file("a.csv", content)) == [(2, ROWS[0]), (4, ROWS[1]), (6, ROWS[2])]
    assert read(file("a.csv.zst", zst(content))) == [(2, ROWS[0]), (4, ROWS[1]), (6, ROWS[2])]


def test_the_index_that_pandas_writes_is_no_column(file: File) -> None:
    assert read(file("a.csv", b",prompt\n0,Q\n")) == [(2, {"prompt": "Q"})]


def test_blank_lines_are_no_rows_and_count(file: File) -> None:
    assert read(file("a.jsonl", b"\n{}\n \n{}\n")) == [(2, {}), (4, {})]
    assert read(file("a.csv", b"prompt\nQ\n\nR\n")) == [(2, {"prompt": "Q"}), (4, {"prompt": "R"})]


@pytest.mark.parametrize("block", [1, 7, 64])
def test_an_array_is_read_in_blocks(file: File, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(sources, "BLOCK", block)
    rows = [*ROWS, {"a": [1, {"b": "]},"}]}, {"n": -12345.5}]
    for indent in (None, 3):
        path = file("a.json", json.dumps(rows, indent=indent, ensure_ascii=False).encode())
        assert read(path) == list(enumerate(rows, start=1))


def test_a_damaged_row_is_told_and_the_next_is_read(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_ROW", 100)
    damaged: dict[bytes, str] = {
        b'{"a": "\xff"}': "not UTF-8",
        b'{"a": "\\ud800"}': "lone surrogate",
        b'{"a": NaN}': "not finite",
        b'{"a": 1, "a": 2}': "key twice",
        b"[1]": "not an object",
        b"12": "not an object",
    }
    lines_only = {
        b'{"a": "': "not JSON",
        b'{"a": "\0"}': "NUL",
        b'{"a": "' + b"x" * 100: "too long line",
    }
    expected = [(i, reason) for i, reason in enumerate((damaged | lines_only).values(), start=1)]
    path = file("a.jsonl", b"\n".join(damaged | lines_only) + b'\n{"a": 1}')
    assert read(path) == [*expected, (len(expected) + 1, {"a": 1})]
    path = file("a.json", b"[" + b",".join(damaged) + b',{"a": 1}]')
    assert read(path) == [*expected[: len(damaged)], (len(damaged) + 1, {"a": 1})]


@pytest.mark.parametrize("content", [b"[" * 2000, b'{"a":' * 2000, b'{"a":' + b"[" * 1010 + b"]" * 1010 + b',"a":1}'])
def test_deep_nesting_is_damage(content: bytes) -> None:
    with pytest.raises(Damaged) as caught:
        parse(content)
    assert caught.value.reason == "too deep"


def test_a_number_of_thousands_of_digits_is_one_row_s_damage(file: File) -> None:
    content = b'{"a": ' + b"9" * 5000 + b"}"
    assert read(file("a.json", b"[" + content + b', {"a": 1}]')) == [(1, "not finite"), (2, {"a": 1})]
    with pytest.raises(Damaged, match="infinite"):
        parse(content)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b'{"prompt": "Q", "pr\\u006fmpt": "R"}', "prompt"),
        ('{"ü": 1, "\\u00fc": 2}'.encode(), "ü"),
        (b'{"a": [{"b": 1, "b": 1}]}', "b"),
        (b'{"a": "\\"a\\": ", "b": {"a": 1}, "a" : 2}', "a"),
    ],
)
def test_a_key_that_stands_twice_is_found_however_it_is_written(content: bytes, key: str) -> None:
    with pytest.raises(Damaged) as caught:
        parse(content)
    assert (caught.value.reason, caught.value.field) == ("key twice", key)


def test_a_key_may_stand_in_a_text_or_within_another_object() -> None:
    row = {"a": '"a": "a"', "b": "a", "c": {"a": 1}}
    assert parse(json.dumps(row).encode()) == row


def test_damaged_rows_of_csv(file: File) -> None:
    content = b'prompt,response\nQ,A\nQ\nQ,A,B\nQ,"A"x\nQ,\xff\nQ,"A\n2"\n'
    assert read(file("a.csv", content)) == [
        (2, {"prompt": "Q", "response": "A"}),
        (3, "wrong number of cells"),
        (4, "wrong number of cells"),
        (5, "not CSV"),
        (6, "not UTF-8"),
        (7, {"prompt": "Q", "response": "A\n2"}),
    ]


def test_bad_utf_8_in_parquet_is_one_row_s_damage(file: File) -> None:
    content = parquet([{"a": "one"}, {"a": "two"}, {"a": "three"}])
    path = file("a.parquet", content)
    table = pa.table({"a": pa.array([b"one", b"\xff", b"three"]).view(pa.string())})
    pq.write_table(table, path)
    assert read(path) == [(1, {"a": "one"}), (2, "not UTF-8"), (3, {"a": "three"})]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:8be3\nsize 875191\n"
GZ = gz(LINES * 1000)
ARRAY = json.dumps(ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", POINTER, "git lfs pull"),
        ("a.jsonl.gz", POINTER, "git lfs pull"),
        ("a.parquet", POINTER, "git lfs pull"),
        ("a.jsonl", b"\n<!DOCTYPE html><html>", "web page"),
        ("a.csv", b"<?xml version='1.0'?><Error>", "web page"),
        ("a.parquet", b"<html>", "web page"),
        ("a.jsonl.gz", GZ[: len(GZ) // 2], "cut off or damaged"),
        ("a.jsonl.gz", GZ[:-4], "cut off or damaged"),
        ("a.jsonl.gz", GZ[:-8] + b"\0\0\0\0" + GZ[-4:], "cut off or damaged"),
        ("a.jsonl.gz", GZ + b"rest", "cut off or damaged"),
        ("a.jsonl.gz", LINES, "cut off or damaged"),
        ("a.jsonl.zst", zst(LINES * 1000)[:-9], "cut off or damaged"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16"),
        ("a.jsonl", LINES.decode().encode("utf-16-be"), "UTF-16"),
        ("a.jsonl", LINES.decode().encode("utf-32"), "UTF-32"),
        ("a.jsonl", b"\x84\x31\x95\x33{}", "GB 18030"),
        ("a.jsonl", GZ, "is gzip, which its name does not say"),
        ("a.csv", parquet(ROWS), "is Parquet, which its name does not say"),
        ("a.jsonl", bytes(range(256)) * 4, "no UTF-8 text"),
        ("a.json", b'{"data": [\n{}\n]}', "neither a JSON array of rows nor JSON Lines"),
        ("a.json", b"prompt: Q", "neither a JSON array of rows nor JSON Lines"),
        ("a.json", ARRAY[:-10], "row 3: the JSON array is cut off or torn here"),
        ("a.json", ARRAY.replace(b"No.", b'"', 1), "row 1: the JSON array is cut off or torn here"),
        ("a.json", ARRAY[:-1] + b",]", "row 4: the JSON array is cut off or torn here"),
        ("a.json", ARRAY + b"\n{}", "goes on after the end of its JSON array"),
        ("a.json", b"[" * 100_000, "row 1: nested too deeply"),
        ("a.parquet", parquet(ROWS)[:-20], "cut off or damaged"),
        ("a.parquet", b"PAR1", "cut off or damaged"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl.gz", gz(b""), "is empty"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.json", b"[ ]", "holds no rows"),
        ("a.csv", b"prompt,response\n", "holds no rows"),
        ("a.csv", b"prompt,response,prompt\n1,2,3\n", "the column prompt stands there twice"),
        ("a.csv", b"Q1,3.5\nQ2,1\n", "the first line is no header, '3.5'"),
        ("a.csv", b"prompt,,response\n1,2,3\n", "the first line is no header, ''"),
        ("a.csv", b'prompt\nQ\n"open\nQ\nQ\n', "lines 3 to 5: not CSV"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(file: File, name: str, content: bytes, told: str) -> None:
    path = file(name, content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="two columns of one name"):
        read(tmp_path / "a.parquet")


def test_a_line_of_100_mb_is_skipped_without_taking_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"a": "')
        for _ in range(100):
            stream.write(b"x" * 1_000_000)
        stream.write(b'"}\n{"a": "b"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read(path) == [(1, "too long line"), (2, {"a": "b"})]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB


def test_the_data_files_of_a_folder_in_the_order_of_their_names(file: File, tmp_path: Path) -> None:
    names = ("b.jsonl", "a/z.csv.gz", "a/B.json")
    notes = (
        "README.md",
        "LICENSE",
        "data.jsonl.dvc",
        ".gitignore",
        ".cache/x.jsonl",
        "a/.hidden.jsonl",
        "dataset-card.md",
        "CITATION.cff",
        "notice.txt",
    )
    for name in (*names, *notes):
        file(name, b"{}")
    assert files_of(tmp_path) == [tmp_path / name for name in ("a/B.json", "a/z.csv.gz", "b.jsonl")]
    assert files_of(tmp_path / "b.jsonl") == [tmp_path / "b.jsonl"]


def test_a_note_s_name_with_a_data_file_s_ending_is_data(file: File, tmp_path: Path) -> None:
    names = ["License.json", "citation.csv", "notice.jsonl.gz", "readme.parquet"]
    for name in names:
        file(name, b"{}")
    assert files_of(tmp_path) == [tmp_path / name for name in names]


def test_links_are_followed_and_lead_in_no_circle(file: File, tmp_path: Path) -> None:
    file("data/a.jsonl", b"{}")
    outside = file("store/deep/b.jsonl", b"{}").parents[1]
    (tmp_path / "data/linked").symlink_to(outside)
    (tmp_path / "data/c.jsonl").symlink_to(outside / "deep/b.jsonl")
    (outside / "deep/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/again").symlink_to(".")
    names = ("a.jsonl", "c.jsonl", "linked/deep/b.jsonl")
    assert files_of(tmp_path / "data") == [tmp_path / "data" / name for name in names]


@pytest.mark.parametrize("target", ["../.git/annex/objects/xx", "a.jsonl"])
def test_a_link_to_what_is_not_fetched(tmp_path: Path, target: str) -> None:
    (tmp_path / ".cache").symlink_to(target)
    link = tmp_path / "a.jsonl"
    link.symlink_to(target)
    for path in (tmp_path, link):
        with pytest.raises(UserError, match=r"a\.jsonl is a link to a file that is not there\. Fetch it .*dvc pull"):
            files_of(path)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl is no file but a pipe"):
        files_of(tmp_path)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refused)  # to root, as whom tests may run, all folders are open
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied"):
        files_of(tmp_path)


@pytest.mark.parametrize("name", [b"\xff.jsonl", b"\xff/a.jsonl"])
def test_a_name_that_is_not_utf_8(file: File, tmp_path: Path, name: bytes) -> None:
    path = file(os.fsdecode(name), b"{}")
    for each in (tmp_path, path):
        with pytest.raises(UserError, match="the name is not UTF-8") as caught:
            files_of(each)
        assert str(caught.value).encode()


def test_a_folder_s_other_files_are_named(file: File, tmp_path: Path) -> None:
    file("a.jsonl", b"{}")
    file("notes.txt", b"")
    file("b.parquet.gz", b"")
    with pytest.raises(UserError, match=r"b\.parquet\.gz, .*notes\.txt: of no known ending"):
        files_of(tmp_path)


def test_a_path_without_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is missing"):
        files_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no data file"):
        files_of(tmp_path)


def test_a_zip_is_named_as_what_it_is(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.jsonl", "w") as archive:
        archive.writestr("a.jsonl", LINES)
    with pytest.raises(UserError, match="is zip, which its name does not say"):
        read(tmp_path / "a.jsonl")
