"""Who answers which prompt, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tasks.conversations import single
from tasks.datasets import Demonstration, Prompt, PromptFacts, prompt_id, read_rows, write_rows
from tasks.demonstrate import choose_prompts, run
from tasks.lineage import load_stages
from tasks.params import load_params
from tasks.stage import Stage, UserError
from tasks.tickets import generate
from tests.tiny import CONVERSATION

ROWS = generate(seed=9, count=200)
PROMPTS = [Prompt(id=prompt_id(single(row.prompt)), prompt=single(row.prompt)) for row in ROWS]


def run_stage(
    root: Path,
    prompts: list[Prompt],
    count: int,
    recorded: list[Demonstration] | None = None,
    facts: list[PromptFacts] | None = None,
) -> tuple[list[Demonstration], dict[str, Any]]:
    """recorded: what came with the raw data, to be taken instead of simulated people's."""
    write_rows(root / "data/prepared/prompts/sft.jsonl", prompts)
    tickets = [PromptFacts(id=prompt_id(single(row.prompt)), source="tickets", ticket=row.ticket) for row in ROWS]
    write_rows(root / "data/prepared/facts.jsonl", facts or tickets)
    write_rows(root / "data/prepared/demonstrations/sft.jsonl", recorded or [])
    write_rows(root / "data/labels/demonstrations.jsonl", [])
    (root / "data/prepared/tokenizer_fingerprint.txt").write_text("0123abcd\n")
    params = load_params(Path("params.yaml"))
    settings = {"prompts": count, "labeler": "simulated" if recorded is None else "recorded"}
    params = params.model_copy(update={"demonstrate": params.demonstrate.model_copy(update=settings)})
    stage = Stage(load_stages()["demonstrate"], params, Mock(), root=root)
    run(stage)
    stage.commit()
    rows = read_rows(root / "data/collected/demonstrations/demonstrations.jsonl", Demonstration)
    return rows, json.loads((root / "data/reports/demonstrate/metrics.json").read_text())["demonstrate"]


def test_demonstrations_and_their_report(tmp_path: Path) -> None:
    rows, metrics = run_stage(tmp_path, PROMPTS, 100)
    assert len(rows) == len({row.id for row in rows}) == metrics["count"] == 100
    assert all(row.response.strip() for row in rows)
    assert sum(metrics["by_labeler"].values()) == 100
    assert metrics["by_labeler"].keys() == {labeler.id for labeler in load_params(Path("params.yaml")).labelers}
    assert 0.4 < metrics["flawed_share"] < 0.8


def test_the_same_again(tmp_path: Path) -> None:
    assert run_stage(tmp_path / "a", PROMPTS, 50) == run_stage(tmp_path / "b", PROMPTS, 50)


def test_a_subset_gets_what_the_whole_gets(tmp_path: Path) -> None:
    whole, _ = run_stage(tmp_path / "whole", PROMPTS, 200)
    few, _ = run_stage(tmp_path / "few", PROMPTS, 40)
    assert few == whole[:40]
    half, _ = run_stage(tmp_path / "half", PROMPTS[::2], 100)
    assert {row.id: row for row in half}.items() <= {row.id: row for row in whole}.items()


def test_the_order_depends_on_the_seed_and_not_on_the_file() -> None:
    chosen = choose_prompts(PROMPTS, 30, seed=1)
    assert choose_prompts(PROMPTS[::-1], 30, seed=1) == chosen
    assert choose_prompts(PROMPTS, 30, seed=2) != chosen


def test_too_few_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"demonstrate\.prompts is 201, and the split sft holds 200 prompts"):
        run_stage(tmp_path, PROMPTS, 201)


def test_prompts_without_a_ticket_are_left_out_and_counted(tmp_path: Path) -> None:
    """Simulated people know support tickets alone."""
    foreign = [Prompt(id=prompt_id(single(text)), prompt=single(text)) for text in ("a poem, please", "2 + 2")]
    facts = [PromptFacts(id=prompt.id, source="mine", ticket=None) for prompt in foreign]
    tickets = [PromptFacts(id=p.id, source="tickets", ticket=row.ticket) for p, row in zip(PROMPTS, ROWS, strict=True)]
    alone, _ = run_stage(tmp_path / "alone", PROMPTS, 200)
    with_them, metrics = run_stage(tmp_path / "both", foreign + PROMPTS, 200, facts=facts + tickets)
    assert with_them == alone
    assert metrics["without_ticket"] == 2
    with pytest.raises(UserError, match=r"demonstrate\.prompts is 1, and the split sft holds 0 prompts that simulated"):
        run_stage(tmp_path / "none", foreign, 1, facts=facts)


# ---- recorded ----

RECORDED = [
    Demonstration(id=prompt_id(prompt), prompt=prompt, response=response, labeler=labeler)
    for prompt, response, labeler in (
        (CONVERSATION, "it is on its way", "zoe"),
        (single("a poem, please"), "roses are red", "mine"),
        (single("a poem, please"), "roses are red", "mine"),  # a source of weight 2
    )
]


def test_recorded_demonstrations_are_all_taken(tmp_path: Path) -> None:
    rows, metrics = run_stage(tmp_path, PROMPTS, 100, recorded=RECORDED)
    assert rows == RECORDED
    assert metrics == {
        "count": 3,
        "by_people": 0,
        "by_simulated": 0,
        "flawed_share": None,
        "without_ticket": 0,
        "by_labeler": {"zoe": 1, "mine": 2},
        "by_flaw": {},
        "people": {},
    }
    assert (tmp_path / "data/collected/demonstrations/tokenizer_fingerprint.txt").read_text() == "0123abcd\n"


def test_without_recorded_demonstrations_it_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`recorded`, and .*sft\.jsonl holds no demonstrations.*data\.sources"):
        run_stage(tmp_path, PROMPTS, 100, recorded=[])
