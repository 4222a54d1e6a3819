"""Data sets of the hub whose files are not what they should be, in the layout of the hub's cache."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.params import Source
from tasks.prepare.hub import rows_of_hub
from tasks.stage import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = Source(kind="prompts", hub="tiny/pairs", revision=COMMIT, split="train")
LINES = b"".join(json.dumps({"prompt": f"Is it {i}?"}).encode() + b"\n" for i in range(2000))
GZ = gzip.compress(LINES, mtime=0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")  # not in the home of whoever tests
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / f"datasets--tiny--pairs/snapshots/{COMMIT}/data"
    folder.mkdir(parents=True)
    return folder


def torn_parquet() -> bytes:
    """The footer is whole, a page within is not."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": [f"Is it {i}?" for i in range(999)]}), sink, row_group_size=100)
    content = bytes(sink.getvalue())
    at = len(content) // 3
    return content[:at] + b"\xff" * 50 + content[at + 50 :]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("train.parquet", torn_parquet(), "row 301 cannot be read: OSError: "),
        ("train.parquet", b"PAR1", "ArrowInvalid: Parquet file size is 4 bytes"),
        ("train.jsonl.gz", GZ[:-30], "EOFError: Compressed file ended"),
        ("train.jsonl.gz", LINES, "BadGzipFile: Not a gzipped file"),
        ("train.jsonl.gz", GZ[:40] + b"\xff" * 30 + GZ[70:], "Error -3 while decompressing"),
        ("train.jsonl", b"", "row 1 cannot be read: StopIteration"),
        ("train.json", b'[{"prompt": "Q"}, 3]', "TypeError"),
        ("train.zip", b"PK\x03\x04", "BadZipFile"),
        ("train.json", b"[]", "holds no rows in the split train"),
    ],
)
def test_a_damaged_data_set_is_refused_with_commit_and_reason(
    folder: Path, name: str, content: bytes, told: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="tiny/pairs at 01234567") as caught:
        list(rows_of_hub(SOURCE))
    assert told in str(caught.value)


def test_rows_have_their_numbers_and_lack_what_is_null(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(b'{"prompt": "Q", "note": null}\n{"prompt": "R", "note": "n"}\n')
    assert list(rows_of_hub(SOURCE)) == [(1, {"prompt": "Q"}), (2, {"prompt": "R", "note": "n"})]
