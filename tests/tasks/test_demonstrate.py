"""Who answers which prompt, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tasks.datasets import Demonstration, Prompt, PromptTicket, prompt_id, read_rows, write_rows
from tasks.demonstrate import choose_prompts, run
from tasks.lineage import load_stages
from tasks.params import load_params
from tasks.stage import Stage, UserError
from tasks.tickets import generate

ROWS = generate(seed=9, count=200)
PROMPTS = [Prompt(id=prompt_id(row.prompt), prompt=row.prompt) for row in ROWS]


def run_stage(root: Path, prompts: list[Prompt], count: int) -> tuple[list[Demonstration], dict[str, Any]]:
    write_rows(root / "data/prepared/prompts/sft.jsonl", prompts)
    tickets = [PromptTicket(id=prompt_id(row.prompt), ticket=row.ticket) for row in ROWS]
    write_rows(root / "data/prepared/tickets.jsonl", tickets)
    params = load_params(Path("params.yaml"))
    params = params.model_copy(update={"demonstrate": params.demonstrate.model_copy(update={"prompts": count})})
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


def test_too_few_prompts() -> None:
    with pytest.raises(UserError, match=r"demonstrate\.prompts is 201, and the split sft holds 200 prompts"):
        choose_prompts(PROMPTS, 201, seed=1)
