"""Run the work of one stage, alone: `python -m tasks.run STAGE`.

`dvc repro` and the Prefect flow call this same command; called by hand it is for a debugger. It reads params.yaml and
dvc.yaml in the current folder, checks both, runs `tasks/STAGE.py`, and puts the outputs in their places only when the
stage has ended well. Exit codes: 0 done, 1 a fault of the program, 2 something to mend (told in one message),
3 people must label something first (tasks/labels/queue.py).
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import signal
import sys
import time
from pathlib import Path

from tasks.lineage import load_stages
from tasks.params import load_params
from tasks.stage import Stage, UserError, WaitsForPeopleError
from tasks.tracking import Tracker

WAITS = 3  # exit code of a stage that people must label something for


def main(argv: list[str] | None = None) -> int:
    try:
        specs = load_stages()
    except FileNotFoundError:
        print("error: no dvc.yaml here; run from the repository's root.", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        prog="python -m tasks.run",
        description="Run the work of one stage, without DVC and without Prefect. Inputs must exist already.",
        epilog="To run what is out of date and nothing else: `dvc repro STAGE`.",
    )
    parser.add_argument("stage", choices=specs, metavar="STAGE", help="one of: " + ", ".join(specs))
    parser.add_argument("--dry-run", action="store_true", help="show what `prepare` would take and drop; write nothing")
    args = parser.parse_args(argv)
    spec = specs[args.stage]
    started = time.monotonic()
    tune_process()
    try:
        params = load_params(Path("params.yaml"))
        module = importlib.import_module(f"tasks.{spec.name}")
        if args.dry_run:
            if not hasattr(module, "dry_run"):
                raise UserError("it has no --dry-run; `prepare` has.")
            module.dry_run(Stage(spec, params, Tracker.in_memory([])))
            return 0
        with Tracker.for_stage(spec, params) as tracker:
            stage = Stage(spec, params, tracker)
            try:
                module.run(stage)
                stage.commit()
            except BaseException:
                stage.discard()
                raise
            tracker.outs({out: Path(out) for out in spec.outs})
    except UserError as error:
        waits = isinstance(error, WaitsForPeopleError)
        print(f"{'waits' if waits else 'error'}: stage `{spec.name}`: {error}", file=sys.stderr)
        return WAITS if waits else 2
    except KeyboardInterrupt:
        print(f"error: stage `{spec.name}` was interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        advice = _ADVICE.get(_errno(error))
        if advice is None:
            raise
        print(f"error: stage `{spec.name}`: {error}. {advice}", file=sys.stderr)
        return 2
    print(f"{spec.name}: done in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return 0


_ADVICE = {
    errno.ENOSPC: "Free some space (`python -m flows.prune --gc` drops old versions from the cache) and run again.",
    errno.EDQUOT: "Your quota is used up; free some space and run again.",
    errno.EACCES: "Give yourself write permission there (`ls -ld` shows who has it) and run again.",
    errno.EPERM: "Give yourself write permission there (`ls -ld` shows who has it) and run again.",
    errno.EROFS: "The file system is read-only; run in a folder that you can write to.",
}


def _errno(error: Exception) -> int:
    """The system's error number. Libraries written in Rust, such as safetensors, have it in their message alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else 0


def tune_process() -> None:
    """Speed and reproducibility settings that must stand before torch is imported."""
    # Threads that wait spin shortly, then sleep. GNU OpenMP's own much longer spinning makes a step three to ten times
    # slower where another process is busy on the same cores; not spinning at all makes generation a third slower on
    # idle ones. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # MKL promises the same bits in every run only in this mode: reductions in a fixed order, no dynamic scheduling.
    # On the CPUs measured it costs nothing.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    if sys.platform == "linux":
        # Keep freed memory for the next step: by default glibc hands every large tensor back to the system and gets
        # new, zeroed pages for the next one, which costs a training step a fifth of its time.
        import ctypes

        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # not in musl
            for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
                libc.mallopt(option, 2**31 - 1)


def _stop_cleanly() -> None:
    """SIGTERM becomes an exception, so that outputs are cleaned up and the run's end is recorded.

    On Linux this process also gets SIGTERM when DVC, its parent, is killed, even with SIGKILL: no orphan stays behind.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end_with_parent()


def end_with_parent() -> None:
    """Have the system send this process SIGTERM when the one that started it is gone (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        parent = os.getppid()
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was gone before we asked
            sys.exit(143)


if __name__ == "__main__":
    _stop_cleanly()
    sys.exit(main())
