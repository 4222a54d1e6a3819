"""Reading what a stage prints, what counts as its error, and how many stages fit into memory."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows import dvc_stage
from flows.dvc_stage import Pool, is_dvc_chatter, split_output, stage_started, told_by, unchanged
from flows.leftovers import mend_leftovers
from tests.flows.toy import Toy, wait_until
from tests.tiny import shell


def _split(*chunks: bytes) -> list[tuple[str, str]]:
    """What `split_output` makes of a pipe into which these chunks are written one by one."""
    read, write = os.pipe()
    parts: list[tuple[str, str]] = []
    reader = threading.Thread(target=lambda: parts.extend(split_output(read)))
    reader.start()
    for chunk in chunks:
        os.write(write, chunk)
        time.sleep(0.05)  # else one read takes two chunks
    os.close(write)
    reader.join()
    os.close(read)
    return parts


def test_lines_and_bars_are_told_apart() -> None:
    printed = b"start\n\r 0%|  |\r50%|# |\r100%|##|\nend"
    assert _split(printed) == [
        ("line", "start"),
        ("progress", " 0%|  |"),
        ("progress", "50%|# |"),
        ("line", "100%|##|"),
        ("line", "end"),
    ]


def test_a_standing_bar_is_shown_before_its_next_state_comes() -> None:
    assert _split(b"\r10%", b"\r20%", b"\n") == [
        ("progress", "10%"),
        ("progress", "10%"),
        ("progress", "20%"),
        ("line", "20%"),
    ]


def test_a_letter_torn_between_two_reads_and_colours_and_windows_line_ends() -> None:
    assert _split(b"gr\xc3", b"\xbcn \x1b[31mred\x1b[0m\r\n") == [("line", "grün red")]


def test_error_is_what_the_stage_told_the_user() -> None:
    lines = ["Running stage 'sft':", "> python -m tasks.run sft", "loading", "error: stage `sft`: no data", "Mend it."]
    failed = "ERROR: failed to reproduce 'sft': failed to run: python -m tasks.run sft, exited with 2"
    assert told_by([*lines, failed]) == "error: stage `sft`: no data\nMend it."


def test_error_is_the_end_of_a_traceback() -> None:
    lines = ["Running stage 'sft':", *(f"  line {number}" for number in range(30)), "ValueError: no"]
    assert told_by(lines).splitlines() == [*(f"  line {number}" for number in range(16, 30)), "ValueError: no"]


def test_error_is_dvc_s_where_the_stage_did_not_start() -> None:
    lines = ["ERROR: failed to reproduce 'sft': missing data 'source': data/raw"]
    assert told_by(lines) == lines[0]


def test_chatter_is_dropped_and_the_start_of_the_stage_seen() -> None:
    assert is_dvc_chatter("Updating lock file 'dvc.lock'")
    assert is_dvc_chatter("Use `dvc push` to send your updates to remote storage.")
    assert not is_dvc_chatter("Stage 'sft' didn't change, skipping")
    assert stage_started("sft", ["Running stage 'sft':"])
    assert not stage_started("sft", ["Stage 'sft' is cached - skipping run, checking out outputs"])


@pytest.mark.parametrize(
    ("free", "all_cores", "side_by_side"),
    [(5.0, "", 1), (6.0, "", 2), (9.0, "", 3), (1.0, "", 1), (9.0, "a", 3), (9.0, "ab", 2), (9.0, "abc", 1)],
)
def test_no_more_stages_at_once_than_fit(
    free: float, all_cores: str, side_by_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dvc_stage, "available_gigabytes", lambda: free)
    most, now, guard = 0, 0, threading.Lock()

    def stage(pool: Pool, name: str) -> None:
        nonlocal most, now
        with pool.room_for(name, 3.0, name in all_cores, lambda _: None):
            with guard:
                now += 1
                most = max(most, now)
            time.sleep(0.1)
            with guard:
                now -= 1

    with Pool() as pool:
        threads = [threading.Thread(target=stage, args=(pool, name)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == side_by_side


def test_a_stopped_pool_lets_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_stage, "available_gigabytes", lambda: 1.0)
    pool = Pool()
    with pool.room_for("first", 1.0, False, print):
        waiting = threading.Thread(target=lambda: pool.room_for("second", 1.0, False, print).__enter__())
        waiting.start()
        with pool:
            pass
        waiting.join(5)
        assert not waiting.is_alive()


def test_what_is_up_to_date_needs_no_process(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toy.root)
    parents: dict[str, set[str]] = {"left": set(), "right": set(), "last": {"left", "right"}}
    assert unchanged(parents) == set()
    shell(toy.root, "dvc", "repro")
    assert unchanged(parents) == {"left", "right", "last"}
    (toy.root / "right.txt").unlink()
    assert unchanged(parents) == {"left"}, "what comes after a change may change"
    with (toy.root / "dvc.yaml").open("a") as file:
        file.write("    nonsense: 1\n")
    assert unchanged(parents) == set(), "where DVC cannot tell"


def test_a_busy_list_of_the_dead_is_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    busy = tmp_path / ".dvc/tmp/rwlock"
    busy.parent.mkdir(parents=True)
    mend_leftovers(tmp_path)  # nothing there, nothing to do
    for text in ("", '{"write": {"a', json.dumps({"write": {"a": {"pid": os.getpid(), "cmd": "dvc repro"}}})):
        busy.write_text(text)  # torn, or a process id that another program has got
        mend_leftovers(tmp_path)
        assert not busy.exists()
    with subprocess.Popen(["sleep", "60"], executable=_sleeping_dvc(tmp_path)) as living:
        wait_until(
            lambda: bool(psutil.Process(living.pid).cmdline()), 30
        )  # empty for a moment after the process has begun
        busy.write_text(json.dumps({"read": {"a": [{"pid": living.pid, "cmd": "dvc repro"}]}}))
        mend_leftovers(tmp_path)
        assert busy.exists()
        living.kill()


def _sleeping_dvc(folder: Path) -> str:
    dvc = folder / "dvc"
    dvc.write_text("#!/bin/sh\nsleep 60\n")
    dvc.chmod(0o755)
    return str(dvc)
