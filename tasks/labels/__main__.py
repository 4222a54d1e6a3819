"""Labels by people, without the page: how far they are, and to and from Label Studio.

python -m tasks.labels status
python -m tasks.labels export --to label-studio
python -m tasks.labels import project-1-at-2026-11-23.json --labeler 1=ann
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tasks.datasets import read_rows
from tasks.labels.closed import why_closed
from tasks.labels.judgments import labeler_name
from tasks.labels.label_studio import export, read_exports, save
from tasks.labels.queue import LABELS, done_by_all, progress, queue_files, read_queue, somebody_else
from tasks.stage import UserError

HOME = Path()
BASE = Path("data/models/base")
SHOWN = 20  # lines on what was dropped
WHO = "Label Studio's number or address and the name here"


def status() -> tuple[Table, list[str]]:
    """(how far each queue is, what to do about it)"""
    hints = []
    table = Table(title="labels by people", title_justify="left")
    for column in ("job", "items", "done", "labels", "missing", "skipped", "set aside", "queue"):
        table.add_column(column, justify="left" if column in ("job", "queue") else "right", overflow="fold")
    for file in _queue_files():
        queue = read_queue(file)
        path, row_type = LABELS[queue.job]
        judgments = read_rows(path, row_type, may_be_empty=True) if path.exists() else []
        if why := why_closed(file, queue, time.time()):
            hints.append(f"{queue.job}: {file} is closed: nobody asks for its labels any more. {why}")
            continue
        told = progress(queue, judgments)
        figures = (told.items, told.done, told.judgments, told.missing, told.skipped, told.set_aside)
        table.add_row(queue.job, *map(str, figures), str(file))
        if not told.missing:
            hints.append(f"{queue.job}: nothing is missing; `make run` goes on, or a run that is suspended by itself.")
        elif by := done_by_all(queue, judgments):
            hints.append(f"{queue.job}: {somebody_else(queue.job, by)}")
    return table, hints


def _queue_files() -> list[Path]:
    files = queue_files(HOME)
    if not files:
        raise UserError(
            "no queue is open: set demonstrate.labeler or rank.labeler to `human` in params.yaml, and `make run`; the "
            "stage that needs labels opens it."
        )
    return files


def named(pairs: list[str]) -> dict[str, str]:
    """--labeler 1=ann -> {"1": "ann"}"""
    names = {}
    for pair in pairs:
        who, _, name = pair.partition("=")
        try:
            names[who.strip()] = labeler_name(name)
        except ValueError as error:
            raise UserError(f"--labeler {pair}: write it as 1=ann, {WHO}. {error}") from None
        if not who.strip():
            raise UserError(f"--labeler {pair}: write it as 1=ann, {WHO}.")
    return names


def token_counter() -> Callable[[str], int] | None:
    """How demonstrations are measured; None where the base model's tokenizer is not here."""
    if not BASE.exists():
        return None
    from tasks.models import load_tokenizer

    tokenizer = load_tokenizer(BASE)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def import_files(files: list[Path], names: dict[str, str], *, dry_run: bool) -> None:
    tokens = token_counter()
    found = read_exports(files, HOME, names, tokens)
    if not dry_run:
        save(found, HOME)
    for job, (path, _) in LABELS.items():
        if rows := found.new[job]:
            skips = sum(row.skipped is not None for row in rows)
            by = ", ".join(sorted({row.labeler for row in rows}))
            print(f"{path}: {len(rows)} judgments by {by}, {skips} of them skips{', not written' * dry_run}")
    if found.new["demonstrate"] and tokens is None:
        print(f"warning: {BASE} is not here, so nobody checked that the answers are short enough.")
    counts = {
        "new": sum(map(len, found.new.values())),
        "imported before": found.known,
        "dropped": len(found.dropped),
        "drafts, not taken": found.drafts,
        "tasks without an annotation": found.unlabelled,
    }
    print("; ".join(f"{count} {what}" for what, count in counts.items()))
    for line in found.dropped[:SHOWN]:
        print(f"dropped: {line}")
    if len(found.dropped) > SHOWN:
        print(f"... and {len(found.dropped) - SHOWN} more")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="how many labels the open queues have and lack")
    command = commands.add_parser("export", help="write what the open queues lack as tasks for Label Studio")
    command.add_argument("--to", type=Path, default=Path(".rlhf/label-studio"), metavar="FOLDER", help="%(default)s")
    command.add_argument("--job", choices=LABELS, help="this one alone")
    command = commands.add_parser("import", help="append what Label Studio exported as JSON to data/labels")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE")
    command.add_argument(
        "--labeler",
        action="append",
        default=[],
        metavar="1=ann",
        help="who an annotator is: Label Studio's number or e-mail address, and the name here; for each one",
    )
    command.add_argument("--dry-run", action="store_true", help="say what would be taken and dropped; write nothing")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "status":
            table, hints = status()
            Console(width=None if sys.stdout.isatty() else 160).print(table)
            print("\n".join(hints), end="\n" * bool(hints))
        elif arguments.command == "export":
            _queue_files()
            try:
                counts = export(HOME, arguments.to, [arguments.job] if arguments.job else list(LABELS))
            except OSError as error:
                raise UserError(f"--to {arguments.to}: {error.strerror}: {error.filename}.") from None
            for job, count in counts.items():
                place = arguments.to / job
                print(f"{job}: {count} tasks, {place}.json and {place}.xml" if count else f"{job}: nothing is missing")
        else:
            import_files(arguments.files, named(arguments.labeler), dry_run=arguments.dry_run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
