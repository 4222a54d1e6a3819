"""The entry point: outputs appear whole or not at all, a user's mistake gets a message and no traceback, and a stage
that was stopped finds its checkpoints again, where nothing that it depends on has changed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tasks import run
from tasks.lineage import StageSpec
from tasks.stage import Stage, UserError
from tasks.tracking import Tracker

ROOT = Path(__file__).parents[2]
OUT, REPORT = "data/out", "data/reports/metrics.json"
SPEC = StageSpec("toy", "python -m tasks.run toy", ("data/in",), ("seed",), (OUT, REPORT))
Work = Callable[[Stage], None]


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A repository with one stage, `toy`, whose record goes to this list."""
    recorded: list[dict[str, Any]] = []

    @contextmanager
    def in_memory(*_: Any) -> Iterator[Tracker]:
        yield Tracker.in_memory(recorded)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Tracker, "for_stage", in_memory)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "dvc.yaml").write_text(
        f"stages: {{toy: {{cmd: {SPEC.cmd}, deps: [data/in], params: [seed], outs: [{OUT}, {REPORT}]}}}}\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data/in").write_text("input")
    return recorded


@pytest.fixture
def toy(events: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], int]:
    """Runs the stage with this function as its work; gives the exit code."""

    def start(work: Work) -> int:
        monkeypatch.setitem(sys.modules, "tasks.toy", SimpleNamespace(run=work))
        return run.main(["toy"])

    return start


def write(stage: Stage, text: str = "new") -> None:
    folder = stage.out(OUT)
    folder.mkdir()
    (folder / "part").write_text(text)
    stage.out(REPORT).write_text(text)


def assert_untouched(text: str | None = None) -> None:
    """The outs are as they were before the run, and nothing else is left behind."""
    if text is None:
        assert not Path(OUT).exists()
        assert not Path(REPORT).exists()
    else:
        assert (Path(OUT) / "part").read_text() == Path(REPORT).read_text() == text
    assert not list(Path().rglob(".tmp-*"))


def test_outs_replace_the_old_ones_and_are_recorded(
    toy: Callable[[Work], int], events: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert toy(lambda stage: write(stage, "old")) == 0
    assert toy(write) == 0
    assert_untouched("new")
    assert set(events[-1]["tags"]) == {f"dvc.out.{OUT}", f"dvc.out.{REPORT}"}
    assert "toy: done in" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("the row is torn"), "the row is torn"),
        (OSError(errno.ENOSPC, "No space left on device", "data/x"), "Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "data/x"), "write permission"),
        # what safetensors raises: no OSError, its writing is done in Rust
        (RuntimeError("I/O error: No space left on device (os error 28)"), "Free some space"),
        (KeyboardInterrupt(), "was interrupted"),
    ],
)
def test_what_the_user_can_mend_is_told_without_traceback(
    toy: Callable[[Work], int], capfd: pytest.CaptureFixture[str], error: BaseException, told: str
) -> None:
    def work(stage: Stage) -> None:
        write(stage)
        raise error

    assert toy(lambda stage: write(stage, "old")) == 0
    assert toy(work) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    said = capfd.readouterr().err
    assert "error: stage `toy`" in said
    assert told in said
    assert "Traceback" not in said
    assert_untouched("old")


def test_a_fault_of_the_program_keeps_its_traceback(toy: Callable[[Work], int]) -> None:
    def work(stage: Stage) -> None:
        write(stage)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        toy(work)
    assert_untouched()


def test_a_missing_input_is_named(toy: Callable[[Work], int], capfd: pytest.CaptureFixture[str]) -> None:
    Path("data/in").unlink()
    assert toy(lambda stage: write(stage, stage.dep("data/in").read_text())) == 2
    assert "data/in is missing" in capfd.readouterr().err


@pytest.mark.parametrize(
    "work", [lambda stage: stage.dep("data/other"), lambda stage: stage.dep("data/inner"), lambda s: s.out("data/x")]
)
def test_only_what_is_declared_can_be_touched(toy: Callable[[Work], int], work: Work) -> None:
    with pytest.raises(AssertionError, match="does not declare"):
        toy(work)


def test_wrong_params_stop_it_before_any_work(toy: Callable[[Work], int], capfd: pytest.CaptureFixture[str]) -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text() + "\npoo: 1\n")
    assert toy(lambda _: pytest.fail("the stage was started")) == 2
    assert "unknown key `poo`" in capfd.readouterr().err


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_no_write_permission(toy: Callable[[Work], int], capfd: pytest.CaptureFixture[str]) -> None:
    Path("data").chmod(0o555)
    try:
        assert toy(write) == 2
    finally:
        Path("data").chmod(0o755)
    assert "write permission" in capfd.readouterr().err


def test_what_a_killed_run_left_is_removed_by_the_next(toy: Callable[[Work], int]) -> None:
    left = Path("data/.tmp-out")
    left.mkdir()
    (left / "half").write_text("half")
    assert toy(write) == 0
    assert [file.name for file in Path(OUT).iterdir()] == ["part"]
    assert_untouched("new")


def test_outside_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main(["toy"]) == 2
    assert "no dvc.yaml here" in capfd.readouterr().err


def test_help_and_unknown_stage(toy: Callable[[Work], int], capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ((["--help"], 0), (["typo"], 2)):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == code
    said = capfd.readouterr()
    assert "one of: toy" in said.out
    assert "invalid choice" in said.err


# ---- checkpoints ----


class Stopped(Exception):
    pass


def train(stage: Stage, seen: list[int], *, steps: int = 3, stop: bool = False) -> None:
    """A training whose state is a sum; `seen` gets the step that it goes on from."""
    found = stage.checkpoints.latest()
    total = found.tensors["total"] if found else torch.zeros(())
    seen.append(found.step if found else 0)
    for step in range(seen[-1] + 1, steps + 1):
        total = total + step
        stage.checkpoints.save(step, {"total": total}, {})
    if stop:
        raise Stopped
    write(stage, str(total.item()))


def checkpoints_left() -> list[str]:
    return sorted(path.name for path in Path(".rlhf/checkpoints/toy").glob("*/*"))


def test_checkpoints_outlive_a_failure_and_end_with_a_success(toy: Callable[[Work], int]) -> None:
    seen: list[int] = []
    for steps in (3, 5):
        with pytest.raises(Stopped):
            toy(lambda stage, steps=steps: train(stage, seen, steps=steps, stop=True))  # type: ignore[misc]
        assert checkpoints_left() == [f"step-{step:06}" for step in (steps - 1, steps)]
    assert toy(lambda stage: train(stage, seen, steps=6)) == 0
    assert seen == [0, 3, 5]
    assert_untouched("21.0")
    assert not checkpoints_left()
    assert toy(lambda stage: train(stage, seen)) == 0
    assert seen[-1] == 0


def change_command() -> None:
    file = Path("dvc.yaml")
    file.write_text(file.read_text().replace(SPEC.cmd, SPEC.cmd + " --fast"))


def change_param(name: str) -> None:
    file = Path("params.yaml")
    changed = re.sub(rf"^( *{name}:) .*", r"\1 7", file.read_text(), count=1, flags=re.MULTILINE)
    assert changed != file.read_text()
    file.write_text(changed)


@pytest.mark.parametrize(
    ("change", "resumes"),
    [
        (lambda: None, True),
        (lambda: change_param("seed"), False),
        (lambda: change_param("bootstrap_samples"), True),  # the stage does not declare it
        (lambda: change_param("concurrency"), False),
        (lambda: change_param("pairs"), True),  # of `judge` it declares another key alone
        (lambda: Path("data/in/rows").write_text("others"), False),
        (lambda: Path("data/in/rows").rename("data/in/lines"), False),
        (lambda: Path("data/in/more").write_text(""), False),
        (lambda: Path("tasks/toy.py").write_text("x = 2"), False),
        (lambda: Path("data/in/rows").touch(), True),
        (lambda: Path("data/in/__pycache__/rows.pyc").write_text("compiled anew"), True),
        (change_command, False),
    ],
)
def test_it_resumes_where_nothing_has_changed_that_it_depends_on(
    toy: Callable[[Work], int], change: Callable[[], None], resumes: bool
) -> None:
    declared = Path("dvc.yaml").read_text()
    declared = declared.replace("[data/in]", "[data/in, tasks/toy.py]").replace("[seed]", "[seed, judge.concurrency]")
    Path("dvc.yaml").write_text(declared)
    Path("data/in").unlink()
    Path("data/in/__pycache__").mkdir(parents=True)
    Path("data/in/rows").write_text("input")
    Path("tasks").mkdir()
    Path("tasks/toy.py").write_text("x = 1")
    seen: list[int] = []
    with pytest.raises(Stopped):
        toy(lambda stage: train(stage, seen, stop=True))
    change()
    with pytest.raises(Stopped):
        toy(lambda stage: train(stage, seen, stop=True))
    assert seen == [0, 3 if resumes else 0]


def test_checkpoints_of_one_other_run_stay(toy: Callable[[Work], int]) -> None:
    """Changed back, it goes on where it was; what was used before that is gone: the disk does not fill up."""
    seen: list[int] = []

    def stopped_with(text: str) -> None:
        Path("data/in").write_text(text)
        with pytest.raises(Stopped):
            toy(lambda stage: train(stage, seen, stop=True))

    stopped_with("a")
    stopped_with("b")
    assert checkpoints_left() == ["step-000002", "step-000003", "step-000003"], "two of its own, one of the other's"
    stopped_with("a")
    stopped_with("c")
    assert len(checkpoints_left()) == 3
    stopped_with("b")
    assert seen == [0, 0, 3, 0, 0]


def test_a_stage_without_checkpoints_pays_nothing_for_them(toy: Callable[[Work], int]) -> None:
    assert toy(write) == 0
    assert not Path(".rlhf").exists()
    code = "import sys, tasks.run; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


# ---- its end ----

SLEEPER = """
import sys, time, types
from tasks import run

def work(stage):
    stage.out("data/out").mkdir()
    print("ready", flush=True)
    while True:  # a signal just before one long sleep would be seen only after it
        time.sleep(0.05)

sys.modules["tasks.toy"] = types.SimpleNamespace(run=work)
run._stop_cleanly()
sys.exit(run.main(["toy"]))
"""


@pytest.mark.usefixtures("events")
def test_sigterm_leaves_nothing_half_written() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], env=environment, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    process.stdout.close()
    assert_untouched()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")
@pytest.mark.usefixtures("events")
def test_it_ends_when_its_parent_is_killed_outright() -> None:
    parent_code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SLEEPER!r}])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", parent_code], env=environment, stdout=subprocess.PIPE)
    assert parent.stdout
    assert parent.stdout.readline() == b"ready\n"
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == b"", "the pipe closes when the stage has ended"
    parent.stdout.close()
    assert_untouched()
