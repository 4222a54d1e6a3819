"""Who labels what next: the desk hands out the items of the open queues and takes judgments in. No web here.

What is done follows from the judgments in data/labels alone. Beside them the desk keeps who holds which item, on disk,
so that a page that is killed and started again gives nobody what another still works on.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tasks.conversations import Conversation
from tasks.datasets import Row
from tasks.labels.closed import folder_of, why_closed
from tasks.labels.judgments import GUIDELINES, Flag, JudgedRanking, Judgment, WrittenDemonstration, version_of
from tasks.labels.label_file import append, recorded
from tasks.labels.people import as_judged, by_content
from tasks.labels.queue import LABELS, Item, Job, Queue, queue_files, read_queue, stamp, still_wanted
from tasks.stage import UserError

LEASES = Path(".rlhf/labelling/leases.json")
LEAVING = 30.0  # seconds that an item waits for a labeler whose tab has closed: it may be a reload
KEEP = 7 * 24 * 3600.0  # seconds that an expired lease is kept: what was written meanwhile can still be saved

CountTokens = Callable[[Path, str], int | None]  # (folder of the queue's run, text); None: there is no tokenizer


class RefusedError(Exception):
    """What a labeler asks for cannot be done; the message says why."""


class Lease(Row):
    """Somebody works on an item until then, and longer if they give signs of life."""

    job: Job
    labeler: str
    item: Item
    seed: int
    max_tokens: int | None
    folder: str  # of the run that asks for the labels
    started_at: str
    until: float  # seconds since 1970


class Leases(Row):
    leases: list[Lease]


class Visit(NamedTuple):
    """One labeler in front of one item: a save says again what it was told when the item was shown."""

    item: str
    started_at: str
    guidelines: str


class Shown(NamedTuple):
    """An item as a labeler sees it: in place p stands responses[order[p]]."""

    prompt: Conversation
    responses: list[str]
    ended: list[bool]
    order: list[int]
    seed: int
    max_tokens: int | None
    folder: Path


class Labels:
    """The judgments of one file, read on as it grows, whoever appends to it."""

    def __init__(self, path: Path, row_type: type[Judgment]) -> None:
        self.path, self.row_type = path, row_type
        recorded(path, row_type)  # it is there, whole, and can be written
        self.file = (0, 0)  # device and inode
        self.size = self.lines = 0  # that were read
        self.by_item: dict[str, dict[str, Judgment]] = {}  # the last of each labeler
        self.by_labeler: dict[str, dict[str, list[Judgment]]] = {}  # all of each item, the newest item last
        self.changed = set[str]()  # items that something new is about, for the desk to clear

    def refresh(self) -> None:
        """Read what is new."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            raise UserError(
                f"{self.path} is gone. Bring it back, as with `git checkout`, or start the page anew; until then "
                "nothing is handed out or saved."
            ) from None
        with file:
            stat = os.fstat(file.fileno())
            if (stat.st_dev, stat.st_ino) != self.file or stat.st_size < self.size:  # another file stands there
                self.changed |= set(self.by_item)
                self.file, self.size, self.lines = (stat.st_dev, stat.st_ino), 0, 0
                self.by_item, self.by_labeler = {}, {}
            file.seek(self.size)
            content = file.read()
        for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                row = self.row_type.model_validate_json(line)
            except ValidationError as error:
                raise UserError(
                    f"{self.path}, line {self.lines + 1}: {error.errors()[0]['msg']}. Mend or remove that line; "
                    "until then nothing is handed out or saved."
                ) from None
            self.size += len(line)
            self.lines += 1
            self.by_item.setdefault(row.item, {})[row.labeler] = row
            mine = self.by_labeler.setdefault(row.labeler, {})
            mine[row.item] = [*mine.pop(row.item, []), row]
            self.changed.add(row.item)


@dataclass
class OpenQueue:
    folder: Path  # of the run that asks
    stamp: tuple[int, int, int]
    queue: Queue
    items: dict[str, Item]
    lacks: dict[str, int] = field(default_factory=dict)  # judgments that each item lacks
    why_closed: str = ""  # nobody asks for them any more


class Desk:
    """Safe to call from several threads. Only one desk at a time may hand out the queues of a folder."""

    def __init__(
        self, home: Path, hold: float, count_tokens: CountTokens, clock: Callable[[], float] = time.time
    ) -> None:
        self.home, self.hold, self.count_tokens, self.clock = home, hold, count_tokens, clock
        self.lock = threading.RLock()
        self.labels = {job: Labels(home / path, row_type) for job, (path, row_type) in LABELS.items()}
        self.queues: dict[Path, OpenQueue] = {}
        self.leases = {(one.job, one.item.item, one.labeler): one for one in self._leases_on_disk()}

    # ---- handing out ----

    def next(self, labeler: str, job: Job) -> dict[str, Any] | str:
        """The next item for the labeler, who holds it from now on; or why there is none."""
        with self.lock:
            self._refresh()
            now = self.clock()
            for (kind, item, name), lease in list(self.leases.items()):
                if (kind, name) != (job, labeler) or lease.until < now:
                    continue
                if self._open_to(labeler, job, item):  # they hold it already, as after a reload
                    self._hold(lease)
                    return self._view(labeler, job, item, lease.started_at)
                del self.leases[kind, item, name]
            found = self._choose(labeler, job)
            if isinstance(found, str):
                return found
            open_queue, one = found
            lease = Lease(
                job=job,
                labeler=labeler,
                item=one,
                seed=open_queue.queue.seed,
                max_tokens=open_queue.queue.max_tokens,
                folder=str(open_queue.folder),
                started_at=self._now(),
                until=now,
            )
            self._hold(lease)
            return self._view(labeler, job, one.item, lease.started_at)

    def again(self, labeler: str, job: Job, item: str) -> dict[str, Any]:
        """An item that the labeler has judged before, with what they said, to change it."""
        with self.lock:
            self._refresh()
            if item not in self.labels[job].by_labeler.get(labeler, {}):
                raise RefusedError("you have not judged this item")
            return self._view(labeler, job, item, self._now())

    def mine(self, labeler: str, job: Job) -> list[str]:
        """The items that the labeler has judged or skipped, the last one first."""
        with self.lock:
            self._refresh()
            return list(self.labels[job].by_labeler.get(labeler, {}))[::-1]

    def alive(self, labeler: str, job: Job, item: str) -> bool:
        """The labeler still works on it. False: it lies with others by now, or needs no label any more."""
        with self.lock:
            self._refresh()
            lease = self.leases.get((job, item, labeler))
            if lease is None or not self._open_to(labeler, job, item):
                return False
            self._hold(lease)
            return True

    def release(self, labeler: str, job: Job, item: str, *, leaving: bool = False) -> None:
        """Back to the queue; a moment later where the tab is `leaving`, which a reload does too."""
        with self.lock:
            lease = self.leases.get((job, item, labeler))
            if lease is None:
                return
            if leaving:
                until = min(lease.until, self.clock() + LEAVING)
                self.leases[job, item, labeler] = lease.model_copy(update={"until": until})
            else:
                del self.leases[job, item, labeler]
            self._write_leases()

    def release_all(self, labeler: str) -> None:
        with self.lock:
            self.leases = {key: lease for key, lease in self.leases.items() if lease.labeler != labeler}
            self._write_leases()

    # ---- taking in ----

    def save_demonstration(self, labeler: str, visit: Visit, response: str) -> None:
        with self.lock:
            self._refresh()
            shown = self._shown(labeler, "demonstrate", visit.item)
            response = response.strip()
            if not response:
                raise RefusedError("the answer is empty")
            count = self.count_tokens(shown.folder, response)
            if count is not None and shown.max_tokens is not None and count > shown.max_tokens:
                raise RefusedError(f"the answer has {count} tokens, and at most {shown.max_tokens} are allowed")
            self._take(
                "demonstrate",
                WrittenDemonstration(**self._common(labeler, visit, shown), skipped=None, response=response),
            )

    def save_ranking(
        self,
        labeler: str,
        visit: Visit,
        ranks: Sequence[int],
        flags: Sequence[Sequence[Flag]],
        ratings: Sequence[int | None],
    ) -> None:
        """ranks, flags, ratings: of the outputs as they were shown. Any whole numbers rank: lower is better."""
        with self.lock:
            self._refresh()
            shown = self._shown(labeler, "rank", visit.item)
            count = len(shown.responses)
            if not len(ranks) == len(flags) == len(ratings) == count:
                raise RefusedError(f"ranks, flags and ratings must have one entry for each of the {count} outputs")
            places = [shown.order.index(index) for index in range(count)]  # of each response
            self._take(
                "rank",
                JudgedRanking(
                    **self._common(labeler, visit, shown),
                    **_ranking_of(shown),
                    skipped=None,
                    ranks=[1 + sum(other < ranks[place] for other in ranks) for place in places],
                    flags=[sorted(set(flags[place])) for place in places],
                    ratings=[ratings[place] for place in places],
                ),
            )

    def skip(self, labeler: str, job: Job, visit: Visit, reason: str) -> None:
        with self.lock:
            self._refresh()
            shown = self._shown(labeler, job, visit.item)
            reason = reason.strip()
            if not reason:
                raise RefusedError("say why you skip it")
            common = self._common(labeler, visit, shown) | {"skipped": reason}
            self._take(
                job,
                WrittenDemonstration(**common, response=None)
                if job == "demonstrate"
                else JudgedRanking(**common, **_ranking_of(shown), ranks=[], flags=[], ratings=[]),
            )

    # ---- how it stands ----

    def progress(self, labeler: str) -> dict[Job, dict[str, Any]]:
        """For each job that has a queue: how far everybody is, and this labeler."""
        today = datetime.fromtimestamp(self.clock()).date()
        with self.lock:
            self._refresh()
            told: dict[Job, dict[str, Any]] = {}
            for job in LABELS:
                queues = self._of(job)
                if not queues:
                    continue
                lacks: dict[str, int] = {}
                for one in queues:
                    for item, count in one.lacks.items():
                        lacks[item] = max(count, lacks.get(item, 0))
                last = [rows[-1] for rows in self.labels[job].by_labeler.get(labeler, {}).values()]
                done = [row for row in last if row.skipped is None]
                told[job] = {
                    "items": len(lacks),
                    "done": sum(count == 0 for count in lacks.values()),
                    "missing": sum(lacks.values()),
                    "mine": len(done),
                    "mine_today": sum(_local_date(row.ended_at) == today for row in done),
                    "mine_skipped": len(last) - len(done),
                }
            return told

    def closed(self) -> dict[Job, str]:
        """The jobs that have queues of which none is asked for any more, and why."""
        with self.lock:
            self._refresh()
            return self._closed()

    def guidelines(self) -> str:
        path = self.home / GUIDELINES
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror}. Labelers go by it; restore it with `git checkout`, or "
                "write one."
            ) from None

    def count(self, labeler: str, item: str, text: str) -> int | None:
        """Tokens of an answer to the item."""
        with self.lock:
            folder = self._shown(labeler, "demonstrate", item).folder
        return self.count_tokens(folder, text.strip())

    # ---- within ----

    def _refresh(self) -> None:
        """Read what others have written meanwhile: judgments, and queues of stages."""
        for labels in self.labels.values():
            labels.refresh()
        found = {}
        for path in queue_files(self.home):
            try:
                written = stamp(path)
                known = self.queues.get(path)
                if known is None or known.stamp != written:
                    queue = read_queue(path)
                    known = OpenQueue(folder_of(path), written, queue, {one.item: one for one in queue.items})
                    rows = [row for held in self.labels[queue.job].by_item.values() for row in held.values()]
                    known.lacks = still_wanted(queue, rows)
                known.why_closed = why_closed(path, known.queue, self.clock())
            except FileNotFoundError:  # the run is over
                continue
            found[path] = known
        self.queues = found
        for one in found.values():
            job = one.queue.job
            for item in self.labels[job].changed & set(one.items):
                alone = one.queue.model_copy(update={"items": [one.items[item]]})
                one.lacks |= still_wanted(alone, self.labels[job].by_item.get(item, {}).values())
        for labels in self.labels.values():  # not before: where a file is damaged, nothing above is done
            labels.changed.clear()

    def _closed(self) -> dict[Job, str]:
        return {
            one.queue.job: f"This job is closed: nobody asks for these labels any more. {one.why_closed} Labels that "
            "were given are kept. The next run asks for what it needs, and that appears here by itself."
            for one in self.queues.values()
            if one.why_closed and not self._of(one.queue.job)
        }

    def _of(self, job: Job) -> list[OpenQueue]:
        return [one for one in self.queues.values() if one.queue.job == job and not one.why_closed]

    def _holders(self, job: Job, labeler: str) -> Counter[str]:
        """{item: others who hold it}"""
        now = self.clock()
        return Counter(
            item
            for (kind, item, name), lease in self.leases.items()
            if kind == job and name != labeler and lease.until >= now
        )

    def _open_to(self, labeler: str, job: Job, item: str) -> bool:
        """Whether a judgment of the item by this labeler is wanted and nobody else is at it."""
        if item in self.labels[job].by_labeler.get(labeler, {}):
            return False
        held = self._holders(job, labeler)[item]
        return any(one.lacks.get(item, 0) > held and labeler not in one.queue.leave_out for one in self._of(job))

    def _choose(self, labeler: str, job: Job) -> tuple[OpenQueue, Item] | str:
        """The first item that others have begun, else the first of the queue; or why there is none."""
        queues = self._of(job)
        if not queues:
            return self._closed().get(job) or (
                "No queue is open. Set demonstrate.labeler or rank.labeler to human in params.yaml and run `make run`; "
                "the stage opens its queue, and it appears here by itself."
            )
        admitted = [one for one in queues if labeler not in one.queue.leave_out]
        if not admitted:
            return f"Labels by {labeler} are not used (human.leave_out in params.yaml), so there is nothing to do here."
        judged = self.labels[job].by_labeler.get(labeler, {})
        held = self._holders(job, labeler)
        first: tuple[OpenQueue, Item] | None = None
        for one in admitted:
            for item, lacks in one.lacks.items():
                if lacks <= held[item] or item in judged:
                    continue
                if held[item] or item in self.labels[job].by_item:
                    return one, one.items[item]
                first = first or (one, one.items[item])
        if first:
            return first
        if not any(count for one in queues for count in one.lacks.values()):
            return "All items have the labels that they should get. Thank you."
        return (
            "There is nothing for you just now: what is still missing lies with other people, or needs somebody who "
            "has not judged it yet. If something becomes free, it appears here by itself."
        )

    def _hold(self, lease: Lease) -> None:
        key = (lease.job, lease.item.item, lease.labeler)
        self.leases[key] = lease.model_copy(update={"until": self.clock() + self.hold})
        self._write_leases()

    def _leases_on_disk(self) -> list[Lease]:
        path = self.home / LEASES
        try:
            return Leases.model_validate_json(path.read_text(encoding="utf-8")).leases
        except FileNotFoundError:
            return []
        except (ValidationError, UnicodeDecodeError):
            print(f"note: {path} is damaged: who holds which item is forgotten, and no label is", file=sys.stderr)
            return []

    def _write_leases(self) -> None:
        now = self.clock()
        self.leases = {key: lease for key, lease in self.leases.items() if lease.until > now - KEEP}
        path = self.home / LEASES
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text(Leases(leases=list(self.leases.values())).model_dump_json(), encoding="utf-8")
        temporary.replace(path)

    def _shown(self, labeler: str, job: Job, item: str) -> Shown:
        """As this labeler sees it, today and later: the order follows from seed, content and name alone. Were it read
        from what the labeler said earlier, an import while the item is open would move the outputs under a save."""
        earlier = self.labels[job].by_labeler.get(labeler, {}).get(item, [None])[-1]
        lease = self.leases.get((job, item, labeler))
        holding = [one for one in self.queues.values() if one.queue.job == job and item in one.items]
        queued = min(holding, key=lambda one: one.why_closed, default=None)  # an open one first: "" sorts first
        holder: Item | Judgment
        if queued:
            holder, seed, limit, folder = queued.items[item], queued.queue.seed, queued.queue.max_tokens, queued.folder
        elif lease:
            holder, seed, limit, folder = lease.item, lease.seed, lease.max_tokens, Path(lease.folder)
        elif earlier:
            holder, limit, folder = earlier, None, self.home
            seed = earlier.seed if isinstance(earlier, JudgedRanking) else 0
        else:
            raise RefusedError("this item is in no queue any more: the outputs or prompts were made anew")
        if not isinstance(holder, Item | JudgedRanking):
            return Shown(holder.prompt, [], [], [], seed, limit, folder)
        order = by_content(holder)
        random.Random(f"{seed}|{item}|{labeler}").shuffle(order)
        return Shown(holder.prompt, holder.responses, holder.ended, order, seed, limit, folder)

    def _view(self, labeler: str, job: Job, item: str, started_at: str) -> dict[str, Any]:
        """What the browser gets: nothing in it tells which model wrote an output."""
        shown = self._shown(labeler, job, item)
        said = self.labels[job].by_labeler.get(labeler, {}).get(item, [None])[-1]
        return {
            "job": job,
            "item": item,
            "prompt": shown.prompt,
            "outputs": [{"text": shown.responses[index], "ended": shown.ended[index]} for index in shown.order],
            "max_tokens": shown.max_tokens,
            "started_at": started_at,
            "guidelines": version_of(self.guidelines()),
            "said": said and _said(said, shown),
        }

    def _common(self, labeler: str, visit: Visit, shown: Shown) -> dict[str, Any]:
        try:
            started = datetime.fromisoformat(visit.started_at)
        except ValueError:
            raise RefusedError("started_at is no time; send the one that came with the item") from None
        if started.tzinfo is None:
            raise RefusedError("started_at does not say in which time zone it is; send the one that came with the item")
        if not 0 < started.timestamp() <= self.clock() + 5:
            raise RefusedError("started_at lies in the future; send the one that came with the item")
        return {
            "item": visit.item,
            "prompt": shown.prompt,
            "labeler": labeler,
            "guidelines": visit.guidelines,
            "started_at": visit.started_at,
            "ended_at": self._now(),
        }

    def _take(self, job: Job, row: Judgment) -> None:
        """On the disk when this returns; once, also where a browser that got no answer sends it again."""
        content = row.model_dump(exclude={"ended_at"})
        earlier = self.labels[job].by_labeler.get(row.labeler, {}).get(row.item, [])
        path = self.labels[job].path
        if any(other.model_dump(exclude={"ended_at"}) == content for other in earlier):
            with path.open("rb") as file:  # it was written, and perhaps killed before the fsync
                os.fsync(file.fileno())
        else:
            append(row, path)
            self._refresh()
        if self.leases.pop((job, row.item, row.labeler), None):
            self._write_leases()

    def _now(self) -> str:
        return datetime.fromtimestamp(self.clock(), UTC).isoformat(timespec="milliseconds")


def _ranking_of(shown: Shown) -> dict[str, Any]:
    return {"responses": shown.responses, "ended": shown.ended, "order": shown.order, "seed": shown.seed}


def _said(row: Judgment, shown: Shown) -> dict[str, Any]:
    """What somebody said, of the outputs in the order in which they are shown."""
    said: dict[str, Any] = {"skipped": row.skipped}
    if isinstance(row, WrittenDemonstration):
        said["response"] = row.response
    elif isinstance(row, JudgedRanking) and row.skipped is None:
        judged = as_judged(shown, row)
        for name in ("ranks", "flags", "ratings"):
            said[name] = [getattr(row, name)[judged[index]] for index in shown.order]
    return said


def _local_date(moment: str) -> object:
    return datetime.fromisoformat(moment).astimezone().date()
