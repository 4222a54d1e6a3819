"""What the person at the terminal sees."""

from __future__ import annotations

import io
import logging
import subprocess
import threading
from pathlib import Path
from typing import Any

import prefect
import pytest
from rich.console import Console

from flows import console
from flows.console import Bar, Terminal
from flows.report import Row, print_report
from tests.flows.toy import ROOT, wait_until


def _record(text: str, pathname: str) -> logging.LogRecord:
    record = logging.LogRecord("prefect.task_runs", logging.INFO, pathname, 1, text, None, None)
    record.task_run_name = "sft"
    return record


def test_a_line_bears_its_stage_and_the_engine_is_silent() -> None:
    screen = io.StringIO()
    with Terminal(Console(file=screen)) as terminal:
        terminal.emit(_record("loss [0.5] at step 3", __file__))
        terminal.emit(_record("Finished in state Completed()", f"{Path(prefect.__file__).parent}/task_engine.py"))
    assert screen.getvalue().split(" ", 1)[1] == "sft          loss [0.5] at step 3\n"


def test_a_bar_is_redrawn_in_place_and_taken_away() -> None:
    screen = io.StringIO()
    with Terminal(Console(file=screen, force_terminal=True, width=40)) as terminal:
        terminal.bar("sft", "50%|##  | 1:00")
        terminal.bar("sft", "75%|### | 0:30")
        assert "75%|### | 0:30" in screen.getvalue()
        assert "\x1b[2K" in screen.getvalue()  # the line before was erased
        terminal.bar("sft", "")
    assert screen.getvalue().count("75%") == 1


def test_without_a_terminal_a_bar_is_logged_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("test")
    with caplog.at_level(logging.INFO):
        bar = Bar("sft", logger)
        bar.show("0%")
        bar.show("10%")
        monkeypatch.setattr(console, "SECONDS_BETWEEN_LOGGED_BARS", 0)
        bar.show("20%")
    assert caplog.messages == ["0%", "20%"]


def test_a_bar_waits_for_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's does not answer: the stage's output must be read all the same."""
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LOGGED_BARS", 0)
    gone = threading.Event()
    calls: list[float] = []

    def create(percent: float, **_: Any) -> None:
        calls.append(percent)
        gone.wait(60)
        raise ConnectionError("away")

    monkeypatch.setattr(console, "create_progress_artifact", create)
    bar = Bar("ppo", logging.getLogger("test"))
    for text in ("10%", "20%", "30%", ""):
        bar.show(text)
    assert calls == [10.0]
    gone.set()

    def shown_again() -> bool:
        bar.show("40%")
        return 40.0 in calls

    assert wait_until(shown_again), "it is tried again"


def test_the_end_shows_table_answers_and_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    samples = tmp_path / "data/reports/evaluation/samples.jsonl"
    samples.parent.mkdir(parents=True)
    samples.write_text('{"prompt": "Where is it?", "base": "Paris", "sft": "On its way", "policy": "Sorry, Ann"}\n')
    screen = io.StringIO()
    row = Row("sft", "ran", 12.34, "sft.validation_loss 1.5", "http://127.0.0.1:5000/#/experiments/1/runs/abc", "")
    print_report([row, Row("evaluate", "cached", None, "", "", "")], Console(file=screen, width=150))
    shown = screen.getvalue()
    for part in ("sft", "12.3", "sft.validation_loss 1.5", row.url, "Where is it?", "Sorry, Ann", "make ui"):
        assert part in shown


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("run", "test", "check", "format", "ui", "help"):
        assert f"make {target} " in listed
