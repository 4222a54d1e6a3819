"""Stage `prepare`: the raw data that params.yaml lists, checked, made one schema, split without leaks.

`python -m tasks.run prepare`; with `--dry-run` it shows what would be taken and dropped, and writes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.stage import Stage


def run(stage: Stage) -> None:
    from tasks.prepare.pipeline import prepare

    prepare(stage)


def dry_run(stage: Stage) -> None:
    from tasks.prepare.pipeline import show

    show(stage)
