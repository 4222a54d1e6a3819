"""What people say, for tests: judgments as the page writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.conversations import Conversation
from tasks.datasets import Samples
from tasks.labels.judgments import JudgedRanking, WrittenDemonstration, item_id

WHEN = {
    "guidelines": "0123456789ab",
    "started_at": "2026-11-23T08:00:00+00:00",
    "ended_at": "2026-11-23T08:00:30+00:00",
}


def wrote(prompt: Conversation, labeler: str, response: str | None, **more: Any) -> WrittenDemonstration:
    """response: None for a skip."""
    skipped = "not for me" if response is None else None
    fields: dict[str, Any] = {
        "item": item_id(prompt),
        "prompt": prompt,
        "labeler": labeler,
        "skipped": skipped,
        "response": response,
    }
    return WrittenDemonstration(**WHEN | fields | more)


def ranked(sample: Samples, labeler: str, ranks: Sequence[int] | None, **more: Any) -> JudgedRanking:
    """ranks: of the sample's responses in their order; None for a skip."""
    count = len(sample.responses)
    fields: dict[str, Any] = {
        "item": item_id(sample.prompt, sample.responses, sample.ended),
        "prompt": sample.prompt,
        "responses": sample.responses,
        "ended": sample.ended,
        "labeler": labeler,
        "skipped": "not for me" if ranks is None else None,
        "order": list(range(count)),
        "seed": 1,
        "ranks": list(ranks or []),
        "flags": [[] for _ in ranks or []],
        "ratings": [None for _ in ranks or []],
    }
    return JudgedRanking(**WHEN | fields | more)
