"""Tell people, through a Prefect notification block, that something failed, missed a gate, or was promoted."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger
from prefect.blocks.core import Block


def notify(slug: str | None, subject: str, facts: dict[str, Any]) -> None:
    """Send it; a notification that cannot be sent is a warning, and no reason for a run to fail.

    slug: type and name of a block, such as `custom-webhook/team` or `sendgrid-email/team`; None: nobody is told.
    """
    if slug is None:
        return
    body = "\n".join([subject, *(f"{name}: {value}" for name, value in facts.items() if name != "figures")])
    try:
        block: Any = Block.load(slug)
        block.notify(body, subject=subject)
    except Exception as error:
        # the message of an HTTP error holds the address, and that may hold a token
        get_run_logger().warning("the notification block `%s` did not work (%s)", slug, type(error).__name__)
