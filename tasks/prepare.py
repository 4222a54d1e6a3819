"""Check the raw data and split it by prompt into sft, reward, ppo and eval. `python -m tasks.run prepare`.

A prompt's split depends on the seed and its own text alone: adding rows never moves a prompt from one split to another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

from tasks.datasets import Prompt, PromptTicket, RawTicket, prompt_id, read_rows, stable_share, write_json, write_rows
from tasks.params import Prepare, Splits, Text
from tasks.stage import Stage, UserError

TEMPLATE_TOKENS = 32  # room for the chat template around prompt and response


def run(stage: Stage) -> None:
    params = stage.params
    model = stage.dep("data/models/base")
    check_room(params.text, model / "config.json")
    rows = read_tickets(stage.dep("data/raw/tickets"))
    check_prompts(rows, token_counter(model), params.text.max_prompt_tokens)
    distinct: dict[str, RawTicket] = {}
    for _, _, row in rows:
        distinct.setdefault(prompt_id(row.prompt), row)  # of equal prompts the first one counts
    splits = split_prompts(distinct, params.prepare.splits, params.seed)

    out = stage.out("data/prepared")
    for name, ids in splits.items():
        write_rows(out / "prompts" / f"{name}.jsonl", [Prompt(id=id, prompt=distinct[id].prompt) for id in ids])
    write_rows(out / "tickets.jsonl", [PromptTicket(id=id, ticket=row.ticket) for id, row in distinct.items()])

    counts = {name: len(ids) for name, ids in splits.items()}
    failed = failed_checks(len(rows), counts, params.prepare)
    duplicates = len(rows) - len(distinct)
    metrics = {"prompts": len(distinct), "duplicates": duplicates, **counts, "failed_checks": len(failed)}
    write_json(stage.out("data/reports/prepare/metrics.json"), {"prepare": metrics})
    stage.tracker.metrics({f"prepare/{name}": float(value) for name, value in metrics.items()})
    stage.tracker.table(
        "prompts", [{"split": name, "prompt": distinct[id].prompt} for name, ids in splits.items() for id in ids[:5]]
    )
    print(f"{metrics['prompts']} prompts ({duplicates} duplicates dropped): {counts}")
    for problem in failed:
        print(f"check failed: {problem}; with register.gates.failed_data_checks no policy from these data is promoted")


def failed_checks(rows: int, counts: dict[str, int], params: Prepare) -> list[str]:
    """What is odd about the data and no error: it is told, counted, and a gate before promotion (tasks/gates.py)."""
    distinct = sum(counts.values())
    failed = []
    if rows - distinct > params.duplicate_limit * rows:
        failed.append(f"{rows - distinct} of {rows} rows are duplicates, more than {params.duplicate_limit:.0%}")
    for name, count in counts.items():
        wanted = distinct * getattr(params.splits, name)
        if abs(count - wanted) > 4 * math.sqrt(max(wanted, 1)):  # by chance in one data set of 10,000
            failed.append(f"the split `{name}` has {count} prompts where {wanted:.0f} were expected")
    return failed


def read_tickets(folder: Path) -> list[tuple[Path, int, RawTicket]]:
    """(file, line, row) of every row of every *.jsonl file in the folder, in the order of the names."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(
            f"{folder} holds no *.jsonl file. Put your tickets there, one JSON object a line with the keys "
            "`prompt` and `ticket`, or run `dvc repro tickets` for the embedded ones."
        )
    return [(file, line, row) for file in files for line, row in enumerate(read_rows(file, RawTicket), start=1)]


def check_room(text: Text, config: Path) -> None:
    """The model must take the longest prompt and response that the parameters allow."""
    facts = json.loads(config.read_text(encoding="utf-8"))
    window = facts.get("sliding_window") if facts.get("use_sliding_window", True) else None
    most = min(facts.get("max_position_embeddings", math.inf), window or math.inf)
    wanted = text.max_prompt_tokens + text.max_response_tokens + TEMPLATE_TOKENS
    if wanted > most:
        raise UserError(
            f"text.max_prompt_tokens + text.max_response_tokens + {TEMPLATE_TOKENS} for the chat template is {wanted} "
            f"tokens, and the model takes {most}. Lower them in params.yaml."
        )


def token_counter(model: Path) -> Callable[[list[str]], list[int]]:
    """How many tokens each text has for the model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def check_prompts(
    rows: list[tuple[Path, int, RawTicket]], count_tokens: Callable[[list[str]], list[int]], limit: int
) -> None:
    """No prompt is empty or longer than the limit."""
    for (file, line, row), tokens in zip(rows, count_tokens([row.prompt for _, _, row in rows]), strict=True):
        if not row.prompt.strip():
            raise UserError(f"{file}, line {line}: the prompt is empty.")
        if tokens > limit:
            raise UserError(
                f"{file}, line {line}: the prompt has {tokens} tokens, and text.max_prompt_tokens is {limit}. "
                "Shorten the prompt, drop the row, or raise the limit in params.yaml."
            )


def split_prompts(ids: Iterable[str], splits: Splits, seed: int) -> dict[str, list[str]]:
    """{split: ids in their given order}."""
    members: dict[str, list[str]] = {name: [] for name in Splits.model_fields}
    for id in ids:
        members[split_of(stable_share(seed, "split", id), splits)].append(id)
    for name, chosen in members.items():
        if not chosen:
            raise UserError(
                f"the split `{name}` is empty: no prompt falls into prepare.splits.{name} = {getattr(splits, name):g}. "
                "Raise that share in params.yaml, or add prompts."
            )
    return members


def split_of(share: float, splits: Splits) -> str:
    """The split whose slice of [0, 1) holds a number; the slices lie in the order of the splits."""
    names = list(Splits.model_fields)
    ends = accumulate(splits.model_dump().values())
    # the last end may lie below 1 by rounding
    return next((name for name, end in zip(names, ends, strict=True) if share < end), names[-1])
