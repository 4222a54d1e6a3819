"""Labelers answer prompts. `python -m tasks.run demonstrate`.

The labelers are simulated, or people on the page of `make label` (`demonstrate.labeler: human`), or people whose
demonstrations came with the raw data (`recorded`). With `human` the stage opens the queue and ends with exit code 3
until people have answered enough; with `human.fill_in` it goes on at once, and simulated labelers answer what nobody
has answered, under names such as `simulated:ada`.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from tasks.conversations import text_of
from tasks.datasets import (
    Demonstration,
    Prompt,
    PromptFacts,
    Ticket,
    prompt_id,
    read_rows,
    stable_share,
    write_figures,
    write_rows,
)
from tasks.demands import demonstrations_by_people, recorded_demonstrations, require, simulated_demonstrations
from tasks.labels.judgments import SIMULATED, WrittenDemonstration, item_id, seconds_of
from tasks.labels.people import Joined, ask_people, tell_not_used
from tasks.labels.queue import Item, Queue, close_queue, labels_wanted, with_origin
from tasks.labels.simulated import choose_labeler, demonstrate, generator
from tasks.params import Params
from tasks.stage import Stage, UserError


class Collected(NamedTuple):
    demonstrations: list[Demonstration]
    flaws: dict[str, list[str]]  # of each simulated demonstration, by its prompt's id
    without_ticket: int  # prompts that simulated labelers could not answer
    counts: dict[str, int]  # of what people on the page did
    people: dict[str, Any]  # the same by labeler, and why they skipped


def run(stage: Stage) -> None:
    ways = {"simulated": by_simulated_labelers, "human": by_people, "recorded": recorded}
    if stage.params.demonstrate.labeler != "human":
        close_queue("demonstrate", stage.root)
    demonstrations, flaws, without_ticket, counts, people = ways[stage.params.demonstrate.labeler](stage)

    folder = stage.out("data/collected/demonstrations")
    write_rows(folder / "demonstrations.jsonl", demonstrations)
    # whoever trains on them sees by it whether they were checked with the model's own tokenizer
    shutil.copy(stage.dep("data/prepared/tokenizer_fingerprint.txt"), folder)

    figures = {
        "count": len(demonstrations),
        "by_people": len(demonstrations) - len(flaws) if people else 0,
        "by_simulated": len(flaws),
        "flawed_share": round(sum(map(bool, flaws.values())) / len(flaws), 4) if flaws else None,
        "without_ticket": without_ticket,
        **counts,
    }
    by_labeler = Counter(row.labeler for row in demonstrations)
    by_flaw = Counter(flaw for found in flaws.values() for flaw in found)
    write_figures(
        stage.out("data/reports/demonstrate/metrics.json"),
        {"demonstrate": {**figures, "by_labeler": by_labeler, "by_flaw": by_flaw, "people": people}},
        ["demonstrate.count"],
    )
    stage.tracker.metrics({f"demonstrate/{name}": value for name, value in figures.items() if value is not None})
    stage.tracker.table(
        "demonstrations",
        [
            {**row.model_dump(), "prompt": text_of(row.prompt), "flaws": ", ".join(flaws.get(row.id, []))}
            for row in demonstrations[:20]
        ],
    )


def recorded(stage: Stage) -> Collected:
    """All that came with the raw data for the split sft."""
    rows = read_rows(stage.dep("data/prepared/demonstrations/sft.jsonl"), Demonstration, may_be_empty=True)
    require(recorded_demonstrations(len(rows)))
    tell_unused_judgments(stage)
    return Collected(rows, {}, 0, {}, {})


def by_simulated_labelers(stage: Stage) -> Collected:
    params = stage.params
    prompts = read_rows(stage.dep("data/prepared/prompts/sft.jsonl"), Prompt)
    tickets = tickets_of(stage)
    known = [prompt for prompt in prompts if prompt.id in tickets]
    require(simulated_demonstrations(params.demonstrate.prompts, len(known)))
    chosen = choose_prompts(known, params.demonstrate.prompts, params.seed)
    demonstrations, flaws = simulated(chosen, tickets, params)
    tell_unused_recorded(stage)
    tell_unused_judgments(stage)
    return Collected(demonstrations, flaws, len(prompts) - len(known), {}, {})


def by_people(stage: Stage) -> Collected:
    """What people wrote, in the queue's order, and what simulated labelers fill in."""
    params = stage.params
    prompts = read_rows(stage.dep("data/prepared/prompts/sft.jsonl"), Prompt)
    require(demonstrations_by_people(params.demonstrate.prompts, len(prompts)))
    queue = queue_of(choose_prompts(prompts, params.demonstrate.prompts, params.seed), params)
    written = read_rows(stage.dep("data/labels/demonstrations.jsonl"), WrittenDemonstration, may_be_empty=True)
    joined = ask_people(with_origin(queue, stage), written, params.demonstrate.human, stage.root)
    tell_unused_recorded(stage)
    demonstrations, too_long = that_fit(joined, queue, stage)
    flaws: dict[str, list[str]] = {}
    without_ticket = 0
    if params.demonstrate.human.fill_in:
        tickets = tickets_of(stage)
        lacking = [Prompt(id=prompt_id(one.prompt), prompt=one.prompt) for one in joined.unlabelled]
        known = [prompt for prompt in lacking if prompt.id in tickets]
        without_ticket = len(lacking) - len(known)
        filled_in, flaws = simulated(known, tickets, params)
        demonstrations += [row.model_copy(update={"labeler": f"{SIMULATED}{row.labeler}"}) for row in filled_in]
        print(
            f"demonstrate: simulated labelers fill in for people on {len(known)} of {len(queue.items)} prompts"
            + (f"; {without_ticket} more have no answer and no ticket to answer by" if without_ticket else "")
        )
    if not demonstrations:
        raise UserError(
            f"there is no demonstration to train on: people answered none of the {len(queue.items)} prompts in a way "
            f"that fits ({joined.counts['skipped']} skips, {too_long} too long), and simulated labelers can answer "
            "support tickets alone. Have people label more (`make label`; raise demonstrate.human.set_aside_after in "
            "params.yaml where what they skipped should be handed out again)."
        )
    return Collected(demonstrations, flaws, without_ticket, joined.counts | {"too_long": too_long}, effort(joined))


def that_fit(joined: Joined[WrittenDemonstration], queue: Queue, stage: Stage) -> tuple[list[Demonstration], int]:
    """(what people wrote, in the queue's order; how many are left out, for they are longer than a response may be).

    The page lets nobody save a longer one; but the limit may have been lowered since, and labels can be imported.
    """
    from tasks.models import encode_response, load_tokenizer  # they import torch, which the other labelers need not

    tokenizer = load_tokenizer(stage.dep("data/models/base"))
    demonstrations, too_long = [], 0
    for one in joined.items:
        for row in joined.labelled[one.item]:
            assert row.response is not None  # it was not skipped
            length = len(encode_response(tokenizer, row.response, ended=False))
            if queue.max_tokens is not None and length > queue.max_tokens:
                too_long += 1
                print(
                    f"demonstrate: {row.labeler}'s answer to item {one.item} has {length} tokens and is not used: "
                    f"text.max_response_tokens leaves room for {queue.max_tokens}"
                )
                continue
            demonstrations.append(
                Demonstration(id=prompt_id(one.prompt), prompt=one.prompt, response=row.response, labeler=row.labeler)
            )
    return demonstrations, too_long


def effort(joined: Joined[WrittenDemonstration]) -> dict[str, Any]:
    """By labeler: demonstrations, skips, median seconds and words; and why people skipped."""
    rows: dict[str, list[WrittenDemonstration]] = defaultdict(list)
    for answers in joined.labelled.values():
        for row in answers:
            rows[row.labeler].append(row)
    skips = Counter(row.labeler for row in joined.skipped)
    return {
        "by_labeler": {
            name: {
                "demonstrations": len(rows[name]),
                "skips": skips[name],
                "median_seconds": median(map(seconds_of, rows[name])) if rows[name] else None,
                "median_words": median(len((row.response or "").split()) for row in rows[name]) if rows[name] else None,
            }
            for name in sorted({*rows, *skips})
        },
        "skip_reasons": Counter(row.skipped for row in joined.skipped),
    }


def queue_of(prompts: Sequence[Prompt], params: Params) -> Queue:
    """What people are asked to answer."""
    human = params.demonstrate.human
    return Queue(
        job="demonstrate",
        seed=params.seed,
        max_tokens=params.text.max_response_tokens - 1,  # the end token takes one
        leave_out=human.leave_out,
        set_aside_after=human.set_aside_after,
        items=[
            Item(
                item=(item := item_id(row.prompt)),
                prompt=row.prompt,
                responses=[],
                ended=[],
                labels=labels_wanted(item, human, params.seed),
            )
            for row in prompts
        ],
    )


def simulated(
    prompts: Sequence[Prompt], tickets: Mapping[str, Ticket], params: Params
) -> tuple[list[Demonstration], dict[str, list[str]]]:
    """(demonstrations, the flaws of each by its prompt's id). tickets: by the prompt's id."""
    demonstrations: list[Demonstration] = []
    flaws: dict[str, list[str]] = {}
    for prompt in prompts:
        labeler = choose_labeler(params.labelers, params.seed, "demonstrate", prompt.id)
        rng = generator(params.seed, "demonstrate", prompt.id, labeler)
        # the end token takes one
        response, found = demonstrate(tickets[prompt.id], labeler, rng, params.text.max_response_tokens - 1)
        row = Demonstration(id=prompt.id, prompt=prompt.prompt, response=response, labeler=labeler.id)
        demonstrations.append(row)
        flaws[prompt.id] = sorted(found)
    return demonstrations, flaws


def choose_prompts(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """The first `count` in an order that depends on the seed and each prompt alone."""
    return sorted(prompts, key=lambda prompt: stable_share(seed, "demonstrate", "order", prompt.id))[:count]


def tickets_of(stage: Stage) -> dict[str, Ticket]:
    facts = read_rows(stage.dep("data/prepared/facts.jsonl"), PromptFacts)
    return {row.id: row.ticket for row in facts if row.ticket}


def tell_unused_recorded(stage: Stage) -> None:
    rows = read_rows(stage.dep("data/prepared/demonstrations/sft.jsonl"), Demonstration, may_be_empty=True)
    labeler = stage.params.demonstrate.labeler
    tell_not_used(len(rows), "demonstrations came with the data and", "demonstrate", labeler)


def tell_unused_judgments(stage: Stage) -> None:
    rows = read_rows(stage.dep("data/labels/demonstrations.jsonl"), WrittenDemonstration, may_be_empty=True)
    labeler = stage.params.demonstrate.labeler
    tell_not_used(len(rows), "lines of data/labels/demonstrations.jsonl", "demonstrate", labeler)
