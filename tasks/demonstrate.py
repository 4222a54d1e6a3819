"""Labelers answer prompts. `python -m tasks.run demonstrate`."""

from __future__ import annotations

from collections import Counter

from tasks.datasets import Demonstration, Prompt, PromptTicket, read_rows, stable_share, write_json, write_rows
from tasks.labels.simulated import choose_labeler, demonstrate, generator
from tasks.stage import Stage, UserError


def run(stage: Stage) -> None:
    params = stage.params
    prompts = read_rows(stage.dep("data/prepared/prompts/sft.jsonl"), Prompt)
    tickets = {row.id: row.ticket for row in read_rows(stage.dep("data/prepared/tickets.jsonl"), PromptTicket)}
    chosen = choose_prompts(prompts, params.demonstrate.prompts, params.seed)

    demonstrations, flaws = [], {}
    for prompt in chosen:
        labeler = choose_labeler(params.labelers, params.seed, "demonstrate", prompt.id)
        rng = generator(params.seed, "demonstrate", prompt.id, labeler)
        # the end token takes one
        response, found = demonstrate(tickets[prompt.id], labeler, rng, params.text.max_response_tokens - 1)
        row = Demonstration(id=prompt.id, prompt=prompt.prompt, response=response, labeler=labeler.id)
        demonstrations.append(row)
        flaws[prompt.id] = sorted(found)
    write_rows(stage.out("data/collected/demonstrations") / "demonstrations.jsonl", demonstrations)

    flawed_share = sum(bool(found) for found in flaws.values()) / len(chosen)
    by_labeler = Counter(row.labeler for row in demonstrations)
    by_flaw = Counter(flaw for found in flaws.values() for flaw in found)
    write_json(
        stage.out("data/reports/demonstrate/metrics.json"),
        {
            "demonstrate": {
                "count": len(demonstrations),
                "flawed_share": round(flawed_share, 4),
                "by_labeler": by_labeler,
                "by_flaw": by_flaw,
            }
        },
    )
    stage.tracker.metrics({"demonstrate/count": float(len(demonstrations)), "demonstrate/flawed_share": flawed_share})
    stage.tracker.table(
        "demonstrations", [{**row.model_dump(), "flaws": ", ".join(flaws[row.id])} for row in demonstrations[:20]]
    )


def choose_prompts(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """The first `count` in an order that depends on the seed and each prompt alone."""
    if len(prompts) < count:
        raise UserError(
            f"demonstrate.prompts is {count}, and the split sft holds {len(prompts)} prompts. "
            "Lower demonstrate.prompts or raise prepare.splits.sft in params.yaml, or add prompts."
        )
    return sorted(prompts, key=lambda prompt: stable_share(seed, "demonstrate", "order", prompt.id))[:count]
