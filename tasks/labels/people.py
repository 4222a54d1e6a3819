"""What people's judgments give a stage: those of the items that it asks about now, joined by content; and what became
of all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol

from tasks.datasets import Ranking, prompt_id
from tasks.labels.aggregation import bradley_terry, flagged_by_half, flagged_last, majority
from tasks.labels.judgments import AnyJudgment, JudgedRanking, Judgment, standing
from tasks.labels.queue import Item, Queue, open_queue, progress, require_labels
from tasks.params import Human, HumanRankings

AGGREGATIONS = {"majority": ("majority", majority), "bradley_terry": ("Bradley-Terry", bradley_terry)}


@dataclass(frozen=True)
class Joined(Generic[AnyJudgment]):
    items: list[Item]  # the queue's
    labelled: dict[str, list[AnyJudgment]]  # by item, all of them: what each labeler says who did not skip it
    skipped: list[AnyJudgment]
    unlabelled: list[Item]  # those that nobody has labelled, and that are not set aside
    counts: dict[str, int]


def ask_people(queue: Queue, judgments: Sequence[AnyJudgment], human: Human, root: Path) -> Joined[AnyJudgment]:
    """Open the queue, and join what people said. WaitsForPeopleError while labels are missing, unless simulated
    labelers fill in for them."""
    open_queue(queue, root)
    tell_unknown_names(queue, judgments, human)
    if not human.fill_in:
        require_labels(queue, judgments)
    joined = join(queue, judgments)
    tell(queue, joined)
    return joined


def join(queue: Queue, judgments: Sequence[AnyJudgment]) -> Joined[AnyJudgment]:
    """Every judgment is used, a skip, or counted under what it is not used for."""
    holding = standing(judgments)
    wanted = [row for row in holding if row.labeler not in queue.leave_out]
    labelled: dict[str, list[AnyJudgment]] = {one.item: [] for one in queue.items}
    here = [row for row in wanted if row.item in labelled]
    for row in here:
        if row.skipped is None:
            labelled[row.item].append(row)
    skipped = [row for row in here if row.skipped is not None]
    skips = [row.item for row in skipped]
    so_far = progress(queue, judgments)
    return Joined(
        items=queue.items,
        labelled=labelled,
        skipped=skipped,
        unlabelled=[
            one for one in queue.items if not labelled[one.item] and skips.count(one.item) < queue.set_aside_after
        ],
        counts={
            "items": len(queue.items),
            "judgments": len(here) - len(skipped),
            "labelers": len({row.labeler for rows in labelled.values() for row in rows}),
            "skipped": len(skipped),
            "set_aside_items": so_far.set_aside,
            "missing_judgments": so_far.missing,
            "other_judgments": len(wanted) - len(here),  # of samples that are not there any more
            "left_out_judgments": len(holding) - len(wanted),
            "replaced_judgments": len(judgments) - len(holding),  # by a later one of the same labeler
        },
    )


def tell(queue: Queue, joined: Joined[AnyJudgment]) -> None:
    counts = joined.counts
    unused = {
        "of samples that are not there any more": counts["other_judgments"],
        "of labelers who are left out": counts["left_out_judgments"],
        "replaced by the same labeler's later one": counts["replaced_judgments"],
    }
    told = [f"{count} {why}" for why, count in unused.items() if count]
    people = f"{counts['labelers']} {'person' if counts['labelers'] == 1 else 'people'}"
    print(
        f"{queue.job}: {counts['judgments']} judgments by {people} on {counts['items']} items"
        + (f"; not used: {', '.join(told)}" if told else "")
        + (f"; {counts['skipped']} skips" if counts["skipped"] else "")
        + (f"; {counts['set_aside_items']} items set aside" if counts["set_aside_items"] else "")
    )


def tell_unknown_names(queue: Queue, judgments: Iterable[Judgment], human: Human) -> None:
    """A name in the parameters that nobody labels by is likely a slip of the pen."""
    known = {row.labeler for row in judgments}
    named = {"leave_out": human.leave_out}
    if isinstance(human, HumanRankings):
        named["held_out_labelers"] = human.held_out_labelers
    for key, names in named.items():
        for name in names:
            if name not in known:
                print(
                    f"{queue.job}: {queue.job}.human.{key} names {name!r}, of whom there is no judgment; there are "
                    f"some of {', '.join(sorted(known)) or 'nobody'}"
                )


def tell_not_used(count: int, what: str, stage: str, labeler: str) -> None:
    if count:
        print(f"{stage}: {count} {what} are not used, for {stage}.labeler is {labeler}")


def rankings_of(
    joined: Joined[JudgedRanking], human: HumanRankings, held_out: Callable[[str], bool]
) -> tuple[list[Ranking], list[Ranking]]:
    """(to train on and to measure by, those of held-out labelers), in the order of the items. held_out: of a prompt,
    by its id.

    Rankings of held-out labelers are never aggregated, nor mixed into an aggregate of others.
    """
    rankings: list[Ranking] = []
    apart: list[Ranking] = []
    for one in joined.items:
        said = {row.labeler: in_order_of(one, row) for row in joined.labelled[one.item]}
        others = {name: said.pop(name) for name in human.held_out_labelers if name in said}
        if human.aggregation == "each" or len(said) < 2:
            rankings += [ranking(one, flagged_last(*own), labeler, held_out) for labeler, own in said.items()]
        else:
            name, aggregate = AGGREGATIONS[human.aggregation]
            ranks, flags = zip(*said.values(), strict=True)
            together = flagged_last(aggregate(ranks), flagged_by_half(flags))
            rankings.append(ranking(one, together, f"{name} of {len(said)}", held_out))
        apart += [ranking(one, flagged_last(*own), labeler, held_out) for labeler, own in others.items()]
    return rankings, apart


def ranking(one: Item, ranks: list[int], labeler: str, held_out: Callable[[str], bool]) -> Ranking:
    id = prompt_id(one.prompt)
    return Ranking(
        id=id,
        prompt=one.prompt,
        responses=one.responses,
        ended=one.ended,
        ranks=ranks,
        labeler=labeler,
        held_out=held_out(id),
    )


def in_order_of(one: Item, row: JudgedRanking) -> tuple[list[int], list[bool]]:
    """(ranks, whether flagged) of the item's outputs, in the item's order: a judgment may have them in another."""
    judged = as_judged(one, row)
    return [row.ranks[place] for place in judged], [bool(row.flags[place]) for place in judged]


class Outputs(Protocol):
    @property
    def responses(self) -> list[str]: ...
    @property
    def ended(self) -> list[bool]: ...


def as_judged(here: Outputs, row: JudgedRanking) -> list[int]:
    """Where each of these outputs stands in the judgment. They are the same: the item's name is made of them."""
    found = [0] * len(here.responses)
    for one, other in zip(by_content(here), by_content(row), strict=True):
        found[one] = other
    return found


def by_content(holder: Outputs) -> list[int]:
    """The places of the outputs, in an order that does not depend on how they stand."""
    outputs = list(zip(holder.responses, holder.ended, strict=True))
    return sorted(range(len(outputs)), key=lambda place: outputs[place])
