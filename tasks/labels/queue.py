"""What people are asked to label: `.rlhf/queue/JOB.json`, written by the stage that needs the labels.

The stage opens the queue, the page (tasks/labels/page.py) hands it out and appends judgments to `data/labels`, and the
stage reads those. What a queue still lacks follows from the judgments alone. It says what its items follow from: by
that the page sees when nobody asks for them any more (tasks/labels/closed.py).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from tasks.conversations import Conversation
from tasks.datasets import Row, flat, stable_share
from tasks.labels.judgments import DEMONSTRATIONS, RANKINGS, JudgedRanking, Judgment, WrittenDemonstration, standing
from tasks.lineage import StageSpec, load_stages, upstream
from tasks.params import Human, Params
from tasks.stage import LABELS as LABELS_FOLDER
from tasks.stage import Stage, UserError, WaitsForPeopleError

QUEUES = Path(".rlhf/queue")
WORKSPACES = Path(".rlhf/workspaces")  # of flows: a run that waits has its queue there
WAIT_FILE = Path(".rlhf/waits.json")  # in a workspace whose run is suspended: how long it waits (flows/waiting.py)
PAGE = "http://127.0.0.1:7861"

Job = Literal["demonstrate", "rank"]
LABELS: dict[Job, tuple[Path, type[Judgment]]] = {
    "demonstrate": (DEMONSTRATIONS, WrittenDemonstration),
    "rank": (RANKINGS, JudgedRanking),
}
# what the items are made of; of the stage's own parameters those that say who is asked for what
MADE_OF: dict[Job, str] = {"demonstrate": "data/prepared/prompts/sft.jsonl", "rank": "data/collected/samples"}
HUMAN = tuple(f"human.{key}" for key in ("labels", "shared_share", "shared_labels", "set_aside_after", "leave_out"))
OWN_KEYS: dict[Job, tuple[str, ...]] = {"demonstrate": ("labeler", "prompts", *HUMAN), "rank": ("labeler", *HUMAN)}


class Item(Row):
    item: str  # item_id
    prompt: Conversation
    responses: list[str]  # to rank; empty where a demonstration is asked for
    ended: list[bool]
    labels: int  # judgments by different people that it should get


class Queue(Row):
    job: Job
    seed: int  # of the order in which outputs are shown
    max_tokens: int | None  # of a demonstration
    leave_out: list[str]  # labelers whose judgments do not count
    set_aside_after: int  # people who skip an item before nobody waits for it
    items: list[Item]
    # {key of params.yaml: value, file or folder: hash}; empty: nobody recorded it
    follows_from: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    items: int
    done: int  # items with all labels that they should get, or set aside
    judgments: int  # that count
    missing: int  # judgments that are still wanted
    skipped: int  # times that somebody skipped an item
    set_aside: int  # items that so many skipped that nobody waits for them


def labels_wanted(item: str, human: Human, seed: int) -> int:
    """How many people should label it: a share of the items, drawn by content, gets more, to measure agreement by."""
    shared = stable_share(seed, "shared", item) < human.shared_share
    return max(human.labels, human.shared_labels) if shared else human.labels


def still_wanted(queue: Queue, judgments: Iterable[Judgment]) -> dict[str, int]:
    """{item: judgments that it lacks}, of all items of the queue; 0 for those that are done or set aside."""
    labelled, skipped = counts(queue, judgments)
    return {
        one.item: 0 if skipped[one.item] >= queue.set_aside_after else max(0, one.labels - labelled[one.item])
        for one in queue.items
    }


def counts(queue: Queue, judgments: Iterable[Judgment]) -> tuple[Counter[str], Counter[str]]:
    """({item: people who labelled it}, {item: people who skipped it}), of those who count."""
    labelled, skipped = Counter[str](), Counter[str]()
    for row in standing(judgments, queue.leave_out):
        (labelled if row.skipped is None else skipped)[row.item] += 1
    return labelled, skipped


def progress(queue: Queue, judgments: Sequence[Judgment]) -> Progress:
    labelled, skipped = counts(queue, judgments)
    wanted = still_wanted(queue, judgments)
    return Progress(
        items=len(queue.items),
        done=sum(count == 0 for count in wanted.values()),
        judgments=sum(labelled[one.item] for one in queue.items),
        missing=sum(wanted.values()),
        skipped=sum(skipped[one.item] for one in queue.items),
        set_aside=sum(
            skipped[one.item] >= queue.set_aside_after and labelled[one.item] < one.labels for one in queue.items
        ),
    )


def with_origin(queue: Queue, stage: Stage) -> Queue:
    return queue.model_copy(update={"follows_from": origin(queue.job, stage.params, load_stages(), stage.root)})


def origin(job: Job, params: Params, specs: dict[str, StageSpec], root: Path) -> dict[str, Any]:
    """What the items follow from: the parameters of the stages up to this one, the raw data, and the file that they are
    made of. Neither code, which may change without them, nor people's labels, which come at any time."""
    parents = upstream(specs)
    before, pending = set[str](), [*parents[job]]
    while pending:
        if (name := pending.pop()) not in before:
            before.add(name)
            pending += parents[name]
    # `prepare` only looks whether the sizes of later stages fit
    later = specs.keys() - before
    asked = {key for name in before for key in specs[name].params if key.partition(".")[0] not in later}
    keys = asked | {f"{job}.{key}" for key in OWN_KEYS[job]}
    made = {out for spec in specs.values() for out in spec.outs}
    read = {dep for name in (*before, job) for dep in specs[name].data_deps}
    raw = {
        dep for dep in read if not dep.startswith(LABELS_FOLDER) and not any(Path(dep).is_relative_to(o) for o in made)
    }
    return flat(params.declared(sorted(keys))) | {path: digest(root / path) for path in sorted(raw | {MADE_OF[job]})}


def digest(path: Path) -> str:
    """Of a file, or of all files of a folder; what has not changed is not read again. Empty: it is not there."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path)} {_digest(file, *stamp(file))}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] if files else ""


def stamp(file: Path) -> tuple[int, int, int]:
    """Another one where the file was written since."""
    stat = file.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=10_000)
def _digest(file: Path, *_stamp: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def open_queue(queue: Queue, root: Path) -> None:
    """Write it to where the page looks, whole or not at all."""
    path = root / QUEUES / f"{queue.job}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(queue.model_dump_json(), encoding="utf-8")
    temporary.replace(path)


def close_queue(job: Job, root: Path) -> None:
    """The stage has other labelers now: nobody should work for it any more."""
    (root / QUEUES / f"{job}.json").unlink(missing_ok=True)


def read_queue(path: Path) -> Queue:
    try:
        return Queue.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged. Remove it; the stage that waits for labels writes it anew.") from None


def queue_files(home: Path) -> list[Path]:
    """The queues that are open: of the folder itself, and of runs that wait in workspaces of their own."""
    return sorted([*home.glob(f"{QUEUES}/*.json"), *home.glob(f"{WORKSPACES}/*/{QUEUES}/*.json")])


def require_labels(queue: Queue, judgments: Sequence[Judgment]) -> None:
    """Open the queue's page to people for as long as labels are missing: WaitsForPeopleError says how many."""
    told = progress(queue, judgments)
    if told.missing:
        by = done_by_all(queue, judgments)
        text = waiting_text(queue.job, told) + (f"\n{somebody_else(queue.job, by)}" if by else "")
        raise WaitsForPeopleError(text, missing=told.missing)


def done_by_all(queue: Queue, judgments: Iterable[Judgment]) -> list[str]:
    """The labelers, where each of them has labelled or skipped all that is missing: none of them can go on."""
    wanted = still_wanted(queue, judgments := list(judgments))
    here = {(row.labeler, row.item) for row in standing(judgments, queue.leave_out) if row.item in wanted}
    labelers = sorted({labeler for labeler, _ in here})
    open_items = [item for item, count in wanted.items() if count]
    return labelers if all((one, item) in here for one in labelers for item in open_items) else []


def somebody_else(job: Job, by: Sequence[str]) -> str:
    return (
        f"What is missing needs somebody else: {', '.join(by)} labelled or skipped it already. {job}.human in "
        "params.yaml says by how many people (labels, shared_share, shared_labels)."
    )


def waiting_text(job: Job, told: Progress) -> str:
    what = {"demonstrate": "demonstration", "rank": "ranking"}[job]
    lack = f"{told.missing} {what}s by people are" if told.missing > 1 else f"1 {what} by people is"
    skips = f"; {told.skipped} times somebody skipped one" if told.skipped else ""
    return (
        f"{lack} missing: {told.done} of {told.items} items are done{skips}.\n"
        f"Open the page with `make label` ({page_address()}); when they are there, the same command goes on from here."
    )


def page_address() -> str:
    """Where labelers reach the page: RLHF_LABEL_URL, or this machine."""
    return os.environ.get("RLHF_LABEL_URL", PAGE)
