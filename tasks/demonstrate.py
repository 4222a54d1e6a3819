"""Labelers answer prompts. `python -m tasks.run demonstrate`.

The labelers are simulated, or people whose demonstrations came with the raw data (`demonstrate.labeler: recorded`).
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.conversations import text_of
from tasks.datasets import (
    Demonstration,
    Prompt,
    PromptFacts,
    Ticket,
    prompt_id,
    read_rows,
    stable_share,
    tell_unused,
    write_json,
    write_rows,
)
from tasks.labels.judgments import WrittenDemonstration, item_id, standing
from tasks.labels.queue import Item, Queue, labels_wanted, open_queue, require_labels
from tasks.labels.simulated import choose_labeler, demonstrate, generator
from tasks.params import Params
from tasks.stage import Stage, UserError


def run(stage: Stage) -> None:
    params = stage.params
    flaws: dict[str, list[str]] = {}
    without_ticket = 0
    if params.demonstrate.labeler == "recorded":
        demonstrations = recorded(stage.dep("data/prepared/demonstrations/sft.jsonl"))
    elif params.demonstrate.labeler == "human":
        prompts = read_rows(stage.dep("data/prepared/prompts/sft.jsonl"), Prompt)
        written = read_rows(stage.dep("data/labels/demonstrations.jsonl"), WrittenDemonstration, may_be_empty=True)
        queue = queue_of(prompts, params)
        open_queue(queue, stage.root)
        require_labels(queue, written)
        demonstrations = by_people(queue, written)
    else:
        prompts = read_rows(stage.dep("data/prepared/prompts/sft.jsonl"), Prompt)
        facts = read_rows(stage.dep("data/prepared/facts.jsonl"), PromptFacts)
        tickets = {row.id: row.ticket for row in facts if row.ticket}
        known = [prompt for prompt in prompts if prompt.id in tickets]
        without_ticket = len(prompts) - len(known)
        demonstrations, flaws = simulated(known, tickets, params)
        tell_unused(stage.dep("data/prepared/demonstrations/sft.jsonl"), Demonstration, "demonstrate")
    folder = stage.out("data/collected/demonstrations")
    write_rows(folder / "demonstrations.jsonl", demonstrations)
    # whoever trains on them sees by it whether they were checked with the model's own tokenizer
    shutil.copy(stage.dep("data/prepared/tokenizer_fingerprint.txt"), folder)

    figures = {
        "count": len(demonstrations),
        "flawed_share": round(sum(map(bool, flaws.values())) / len(flaws), 4) if flaws else None,
        "without_ticket": without_ticket,
    }
    by_labeler = Counter(row.labeler for row in demonstrations)
    by_flaw = Counter(flaw for found in flaws.values() for flaw in found)
    write_json(
        stage.out("data/reports/demonstrate/metrics.json"),
        {"demonstrate": {**figures, "by_labeler": by_labeler, "by_flaw": by_flaw}},
    )
    stage.tracker.metrics({f"demonstrate/{name}": value for name, value in figures.items() if value is not None})
    stage.tracker.table(
        "demonstrations",
        [
            {**row.model_dump(), "prompt": text_of(row.prompt), "flaws": ", ".join(flaws.get(row.id, []))}
            for row in demonstrations[:20]
        ],
    )


def queue_of(prompts: list[Prompt], params: Params) -> Queue:
    """What people are asked to answer."""
    human = params.demonstrate.human
    chosen = choose_prompts(prompts, params.demonstrate.prompts, params.seed)
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
            for row in chosen
        ],
    )


def by_people(queue: Queue, written: Sequence[WrittenDemonstration]) -> list[Demonstration]:
    """What people wrote for the queue's prompts, in its order."""
    answers: dict[str, list[WrittenDemonstration]] = defaultdict(list)
    for row in standing(written, queue.leave_out):
        answers[row.item].append(row)
    return [
        Demonstration(id=prompt_id(one.prompt), prompt=one.prompt, response=row.response, labeler=row.labeler)
        for one in queue.items
        for row in answers[one.item]
        if row.response is not None
    ]


def recorded(path: Path) -> list[Demonstration]:
    """All that came with the raw data for the split sft."""
    rows = read_rows(path, Demonstration, may_be_empty=True)
    if not rows:
        raise UserError(
            f"demonstrate.labeler is `recorded`, and {path} holds no demonstrations. Add a source of the kind "
            "`demonstrations` to data.sources in params.yaml, or set demonstrate.labeler to `simulated`."
        )
    return rows


def simulated(
    prompts: list[Prompt], tickets: Mapping[str, Ticket], params: Params
) -> tuple[list[Demonstration], dict[str, list[str]]]:
    """(demonstrations, the flaws of each by its prompt's id). tickets: by the prompt's id."""
    demonstrations: list[Demonstration] = []
    flaws: dict[str, list[str]] = {}
    for prompt in choose_prompts(prompts, params.demonstrate.prompts, params.seed):
        labeler = choose_labeler(params.labelers, params.seed, "demonstrate", prompt.id)
        rng = generator(params.seed, "demonstrate", prompt.id, labeler)
        # the end token takes one
        response, found = demonstrate(tickets[prompt.id], labeler, rng, params.text.max_response_tokens - 1)
        row = Demonstration(id=prompt.id, prompt=prompt.prompt, response=response, labeler=labeler.id)
        demonstrations.append(row)
        flaws[prompt.id] = sorted(found)
    return demonstrations, flaws


def choose_prompts(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """The first `count` in an order that depends on the seed and each prompt alone."""
    if len(prompts) < count:
        raise UserError(
            f"demonstrate.prompts is {count}, and the split sft holds {len(prompts)} prompts that simulated people can "
            "answer: support tickets and nothing else. Lower demonstrate.prompts or raise prepare.splits.sft in "
            "params.yaml, or add such prompts; or set demonstrate.labeler to `recorded` to use your own demonstrations."
        )
    return sorted(prompts, key=lambda prompt: stable_share(seed, "demonstrate", "order", prompt.id))[:count]
