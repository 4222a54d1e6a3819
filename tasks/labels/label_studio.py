"""Label Studio in place of our page: open queues become its tasks, its exported JSON becomes judgments.

A task holds all that a judgment needs, and the item's name, which is a hash of its content: what comes back goes to the
item that was shown, or nowhere. Outputs stand in a drawn order and no model is named. Checked with Label Studio 1.23.
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from tasks.conversations import Conversation, text_of
from tasks.datasets import Row, read_rows
from tasks.labels.closed import why_closed
from tasks.labels.judgments import (
    GUIDELINES,
    Flag,
    JudgedRanking,
    Judgment,
    WrittenDemonstration,
    item_id,
    standing,
    version_of,
)
from tasks.labels.label_file import append_all, recorded
from tasks.labels.queue import LABELS, Item, Job, Queue, queue_files, read_queue, still_wanted
from tasks.stage import UserError

NO_REASON = "skipped in Label Studio"
FLAGS: tuple[Flag, ...] = get_args(Flag)


class TaskData(Row):
    """`data` of one of Label Studio's tasks. What labelers look at is `text` and, of a ranking, `outputs`."""

    job: Job
    item: str
    text: str
    prompt: Conversation
    outputs: list[dict[str, str]]  # {"name": "Answer 1", "text": ...} in the order shown; empty for a demonstration
    ended: list[bool]  # of `outputs`
    order: list[int]  # in place p stands the item's responses[order[p]]
    seed: int
    max_tokens: int | None
    guidelines: str  # version
    labels: int  # people who should label it


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export(home: Path, folder: Path, jobs: Iterable[Job]) -> dict[Job, int]:
    """Write JOB.json and JOB.xml for what open queues still lack; gives the number of tasks, by job."""
    guidelines = home / GUIDELINES
    version = version_of(guidelines.read_text(encoding="utf-8") if guidelines.exists() else "")
    every = {path: read_queue(path) for path in queue_files(home)}
    queues = [queue for path, queue in every.items() if not why_closed(path, queue, time.time())]
    written: dict[Job, int] = {}
    for job in jobs:
        tasks: dict[str, TaskData] = {}
        for queue in queues:
            if queue.job == job:
                path, row_type = LABELS[job]
                judged = read_rows(home / path, row_type, may_be_empty=True) if (home / path).exists() else []
                wanted = still_wanted(queue, judged)
                tasks |= {one.item: task_of(queue, one, version) for one in queue.items if wanted[one.item]}
        if tasks:
            limit = min((task.max_tokens for task in tasks.values() if task.max_tokens), default=0)
            # Label Studio's own keys hold no dots and no colons: a task is {"data": ...} and nothing else
            rows = [{"data": task.model_dump()} for task in tasks.values()]
            _write(folder / f"{job}.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
            most = max((len(task.outputs) for task in tasks.values()), default=0)
            _write(folder / f"{job}.xml", ranking_page(most) if job == "rank" else writing_page(limit))
        written[job] = len(tasks)
    return written


def task_of(queue: Queue, item: Item, guidelines: str) -> TaskData:
    order = list(range(len(item.responses)))
    random.Random(f"{queue.seed}|label studio|{item.item}").shuffle(order)
    return TaskData(
        job=queue.job,
        item=item.item,
        text=text_of(item.prompt),
        prompt=item.prompt,
        outputs=[
            {"name": f"Answer {place}", "text": item.responses[index]} for place, index in enumerate(order, start=1)
        ],
        ended=[item.ended[index] for index in order],
        order=order,
        seed=queue.seed,
        max_tokens=queue.max_tokens,
        guidelines=guidelines,
        labels=item.labels,
    )


def ranking_page(most: int) -> str:
    """The labeling configuration. Label Studio's own Ranker knows no ties: each answer gets a place instead."""
    places = "".join(f'<Choice value="{place}"/>' for place in range(1, most + 1))
    flags = "".join(f'<Choice value="{flag}"/>' for flag in FLAGS)
    return f"""<View>
  <Text name="prompt" value="$text"/>
  <Header size="5" value="Give each answer a place: 1 is best, the same place is a tie."/>
  <Repeater on="$outputs" indexFlag="{{{{idx}}}}">
    <Header size="4" value="$outputs[{{{{idx}}}}].name"/>
    <Text name="output_{{{{idx}}}}" value="$outputs[{{{{idx}}}}].text"/>
    <Choices name="place_{{{{idx}}}}" toName="output_{{{{idx}}}}" choice="single" showInline="true" required="true" \
requiredMessage="Give every answer a place">{places}</Choices>
    <Choices name="flags_{{{{idx}}}}" toName="output_{{{{idx}}}}" choice="multiple" showInline="true">{flags}</Choices>
    <Rating name="rating_{{{{idx}}}}" toName="output_{{{{idx}}}}" maxRating="7"/>
  </Repeater>
  {_WHY_SKIPPED}
</View>
"""


def writing_page(max_tokens: int) -> str:
    limit = f" At most {max_tokens} tokens, about {max_tokens * 3 // 4} words." if max_tokens else ""
    return f"""<View>
  <Text name="prompt" value="$text"/>
  <Header size="5" value="Write the answer.{limit}"/>
  <TextArea name="response" toName="prompt" rows="8" maxSubmissions="1" editable="true" required="true" \
requiredMessage="Write an answer, or skip"/>
  {_WHY_SKIPPED}
</View>
"""


_WHY_SKIPPED = (
    '<TextArea name="why_skipped" toName="prompt" rows="1" maxSubmissions="1" editable="true" '
    'placeholder="Only if you skip: why? Enter keeps it"/>'
)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Import


@dataclass
class Imported:
    """What became of the annotations of some exported files."""

    new: dict[Job, list[Judgment]] = field(default_factory=lambda: {job: [] for job in LABELS})
    known: int = 0  # imported before
    drafts: int = 0  # saved, but not submitted; and Label Studio's own predictions
    unlabelled: int = 0  # tasks without an annotation
    dropped: list[str] = field(default_factory=list)  # where, and why


class DroppedError(Exception):
    """An annotation that cannot be taken; the message says why."""


def read_exports(
    files: Iterable[Path], home: Path, names: Mapping[str, str], tokens: Callable[[str], int] | None
) -> Imported:
    """The judgments of exported files that `data/labels` does not have, oldest first.

    names: {Label Studio's number or e-mail address of an annotator: the labeler's name here}. tokens: the length of a
    demonstration, with the end token not counted; None: lengths are not checked. UserError for a file that is none of
    Label Studio's JSON exports; then nothing should be written.
    """
    found = Imported()
    judgments: dict[Job, list[Judgment]] = {job: [] for job in LABELS}
    for file in files:
        for place, task in enumerate(_tasks(file), start=1):
            where = f"{file}, task {task.get('id', f'number {place}')}"
            annotations = [one if isinstance(one, dict) else {} for one in task["annotations"]]
            found.unlabelled += not annotations
            found.drafts += len(_list(task.get("drafts")))
            try:
                data = task_data(task["data"])
            except DroppedError as why:
                found.dropped += [f"{where}, {_annotation(one)}: {why}" for one in annotations]
                continue
            for one in annotations:
                try:
                    judgments[data.job].append(judgment(data, one, labeler_of(one, names, where), tokens))
                except DroppedError as why:
                    found.dropped.append(f"{where}, {_annotation(one)}: {why}")
    for job, rows in judgments.items():
        path, row_type = LABELS[job]
        before = recorded(home / path, row_type) if rows and (home / path).exists() else []
        known = {_said(row) for row in before}
        stands = {(row.item, row.labeler): ended(row) for row in standing(before)}
        for row in sorted(rows, key=ended):
            if _said(row) in known:
                found.known += 1
            elif (key := (row.item, row.labeler)) in stands and ended(row) < stands[key]:
                found.dropped.append(f"item {row.item}, {row.labeler}: said something else later, which stands")
            else:
                known.add(_said(row))
                found.new[job].append(row)
    return found


def ended(row: Judgment) -> datetime:
    return datetime.fromisoformat(row.ended_at)


def save(found: Imported, home: Path) -> None:
    for job, rows in found.new.items():
        path = home / LABELS[job][0]
        if rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            append_all(rows, path)


def task_data(data: object) -> TaskData:
    """Checked: the item's name is that of its content."""
    try:
        task = TaskData.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise DroppedError(f"not a task of ours: `data.{place}`: {problem['msg']}") from None
    count = len(task.outputs)
    if (
        len(task.ended) != count
        or sorted(task.order) != list(range(count))
        or any("text" not in o for o in task.outputs)
    ):
        raise DroppedError("the outputs, their `ended` and their `order` do not go together")
    if (task.job == "rank") != (count > 0):
        raise DroppedError(f"{count} outputs do not go with the job `{task.job}`")
    if item_id(task.prompt, [one["text"] for one in task.outputs], task.ended) != task.item:
        raise DroppedError(f"the prompt or the outputs are not those of item {task.item}: they were changed")
    return task


def judgment(
    task: TaskData, annotation: Mapping[str, Any], labeler: str, tokens: Callable[[str], int] | None
) -> Judgment:
    """What one annotation says of its task."""
    values: dict[str, Any] = defaultdict(dict)
    for one in _list(annotation.get("result")):
        if isinstance(one, dict) and isinstance(one.get("value"), dict):
            values[str(one.get("from_name"))] = one["value"]
    skipped = None
    if annotation.get("was_cancelled"):
        skipped = _text(values["why_skipped"]).strip() or NO_REASON
    started_at, ended_at = times(annotation)
    said: dict[str, Any] = {
        "item": task.item,
        "prompt": task.prompt,
        "labeler": labeler,
        "guidelines": task.guidelines,
        "started_at": started_at,
        "ended_at": ended_at,
        "skipped": skipped,
    }
    try:
        if task.job == "demonstrate":
            response = None if skipped is not None else written(values["response"], task.max_tokens, tokens)
            return WrittenDemonstration(**said, response=response)
        back = sorted(range(len(task.order)), key=lambda place: task.order[place])  # response -> place where it stood
        ranks, flags, ratings = ([], [], []) if skipped is not None else ranked(values, len(task.outputs))
        return JudgedRanking(
            **said,
            responses=[task.outputs[place]["text"] for place in back],
            ended=[task.ended[place] for place in back],
            order=task.order,
            seed=task.seed,
            ranks=[ranks[place] for place in back if ranks],
            flags=[flags[place] for place in back if ranks],
            ratings=[ratings[place] for place in back if ranks],
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise DroppedError(f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}") from None


def written(value: Mapping[str, Any], max_tokens: int | None, tokens: Callable[[str], int] | None) -> str:
    """A demonstration's text."""
    response = _text(value)
    if not response.strip():
        raise DroppedError("no answer was written")
    if tokens and max_tokens and (length := tokens(response)) > max_tokens:
        raise DroppedError(f"the answer has {length} tokens, more than {max_tokens}")
    return response


def ranked(values: Mapping[str, Mapping[str, Any]], count: int) -> tuple[list[int], list[list[Flag]], list[int | None]]:
    """(ranks, flags, ratings) of the outputs in the order shown."""
    given = [_list(values[f"place_{place}"].get("choices")) for place in range(count)]
    if lacking := sum(not choices for choices in given):
        raise DroppedError(f"{lacking} of {count} answers have no place")
    try:
        places = [int(choices[0]) for choices in given]
    except (ValueError, TypeError):
        raise DroppedError("a place is not a number") from None
    ranks = [1 + sum(other < place for other in places) for place in places]  # 1, 2, 2, 4
    flags = [[flag for flag in FLAGS if flag in _list(values[f"flags_{at}"].get("choices"))] for at in range(count)]
    return ranks, flags, [values[f"rating_{at}"].get("rating") for at in range(count)]


def times(annotation: Mapping[str, Any]) -> tuple[str, str]:
    """(started_at, ended_at): Label Studio says when it was last saved and how many seconds it was open."""
    try:
        ended = datetime.fromisoformat(str(annotation.get("updated_at") or annotation["created_at"])).astimezone(UTC)
        started = ended - timedelta(seconds=float(annotation.get("lead_time") or 0))
    except (KeyError, ValueError, TypeError, OverflowError):
        raise DroppedError("it has no time (`created_at`, `lead_time`)") from None
    return started.isoformat(timespec="milliseconds"), ended.isoformat(timespec="milliseconds")


def labeler_of(annotation: Mapping[str, Any], names: Mapping[str, str], where: str) -> str:
    by = annotation.get("completed_by")
    known = [str(by[key]) for key in ("id", "email") if by.get(key)] if isinstance(by, dict) else [str(by or "")]
    if not any(known):
        raise DroppedError("it does not say who made it (`completed_by`)")
    for one in known:
        if one in names:
            return names[one]
    if "@" in known[-1]:
        return known[-1]
    raise UserError(
        f"{where}: the annotator {known[-1]} has no name here. Say who it is, with --labeler {known[-1]}=NAME; Label "
        "Studio's page Organization lists its annotators."
    )


def _tasks(file: Path) -> list[dict[str, Any]]:
    try:
        tasks = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}. Nothing was imported.") from None
    if not isinstance(tasks, list) or not all(
        isinstance(task, dict) and isinstance(task.get("annotations"), list) and "data" in task for task in tasks
    ):
        raise UserError(
            f"{file} is no list of tasks with `data` and `annotations`: in Label Studio, export as JSON, not as "
            "JSON-MIN or another format. Nothing was imported."
        )
    return tasks


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Mapping[str, Any]) -> str:
    """Of a TextArea."""
    return "\n".join(str(line) for line in _list(value.get("text")))


def _annotation(one: Mapping[str, Any]) -> str:
    return f"annotation {one.get('id', '?')}"


def _said(row: Judgment) -> str:
    return row.model_dump_json(exclude={"started_at", "guidelines"})
