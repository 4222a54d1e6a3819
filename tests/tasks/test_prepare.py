"""Checking and splitting the raw data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tasks import prepare
from tasks.datasets import Prompt, PromptTicket, RawTicket, Row, prompt_id, read_rows, write_rows
from tasks.lineage import load_stages
from tasks.params import Params, Splits, load_params
from tasks.stage import Stage, UserError
from tasks.tickets import generate

SPLITS = Splits(sft=0.3, reward=0.3, ppo=0.3, eval=0.1)
ROWS = generate(seed=5, count=300)


def ids_of(rows: list[RawTicket]) -> list[str]:
    return [prompt_id(row.prompt) for row in rows]


def in_words(texts: list[str]) -> list[int]:
    """Stands in for a tokenizer."""
    return [len(text.split()) for text in texts]


@pytest.fixture
def run_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run the stage on rows, with words for tokens; returns its metrics."""

    def run(rows: list[RawTicket], positions: int = 8192, **text: int) -> dict[str, Any]:
        monkeypatch.setattr(prepare, "token_counter", lambda _model: in_words)
        model = tmp_path / "data/models/base"
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
        write_rows(tmp_path / "data/raw/tickets/tickets.jsonl", rows)
        params = load_params(Path("params.yaml"))
        params = params.model_copy(update={"text": params.text.model_copy(update=text)})
        stage = make_stage(params, tmp_path)
        prepare.run(stage)
        stage.commit()
        metrics: dict[str, Any] = json.loads((tmp_path / "data/reports/prepare/metrics.json").read_text())
        return metrics

    return run


def make_stage(params: Params, root: Path) -> Stage:
    return Stage(load_stages()["prepare"], params, Mock(), root=root)


def read_splits(root: Path) -> dict[str, list[Prompt]]:
    return {name: read_rows(root / f"data/prepared/prompts/{name}.jsonl", Prompt) for name in Splits.model_fields}


def test_every_prompt_is_in_one_split(run_prepare: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    metrics = run_prepare(ROWS)["prepare"]
    splits = read_splits(tmp_path)
    ids = [row.id for rows in splits.values() for row in rows]
    assert sorted(ids) == sorted(ids_of(ROWS))
    assert metrics == {"prompts": 300, "duplicates": 0, "failed_checks": 0} | {
        name: len(rows) for name, rows in splits.items()
    }
    tickets = {row.id: row.ticket for row in read_rows(tmp_path / "data/prepared/tickets.jsonl", PromptTicket)}
    assert tickets == {prompt_id(row.prompt): row.ticket for row in ROWS}


def test_duplicates_are_dropped_and_counted(run_prepare: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    other = ROWS[1].model_copy(update={"ticket": ROWS[0].ticket})
    metrics = run_prepare([*ROWS, ROWS[0], other])["prepare"]
    assert (metrics["prompts"], metrics["duplicates"]) == (300, 2)
    rows = read_rows(tmp_path / "data/prepared/tickets.jsonl", PromptTicket)
    assert [row.id for row in rows] == ids_of(ROWS)  # in their first order
    assert rows[1].ticket == ROWS[1].ticket  # the first counts


def test_adding_rows_moves_nothing() -> None:
    few, many = (prepare.split_prompts(ids_of(rows), SPLITS, seed=1) for rows in (ROWS[:200], ROWS))
    for name in Splits.model_fields:
        assert set(few[name]) == set(many[name]) & set(ids_of(ROWS[:200]))


def test_a_larger_share_takes_from_its_neighbour_alone() -> None:
    wider = prepare.split_prompts(ids_of(ROWS), Splits(sft=0.4, reward=0.2, ppo=0.3, eval=0.1), seed=1)
    before = prepare.split_prompts(ids_of(ROWS), SPLITS, seed=1)
    assert set(before["sft"]) < set(wider["sft"])
    assert (before["ppo"], before["eval"]) == (wider["ppo"], wider["eval"])


def test_another_seed_splits_otherwise() -> None:
    assert prepare.split_prompts(ids_of(ROWS), SPLITS, 1) != prepare.split_prompts(ids_of(ROWS), SPLITS, 2)


def test_shares_are_kept() -> None:
    ids = [str(number) for number in range(20_000)]
    counts = {name: len(members) for name, members in prepare.split_prompts(ids, SPLITS, seed=1).items()}
    for name, share in SPLITS.model_dump().items():
        assert counts[name] / len(ids) == pytest.approx(share, abs=0.015)  # 4 standard errors


@pytest.mark.parametrize(
    ("share", "name"),
    [(0.0, "sft"), (0.2999, "sft"), (0.3, "reward"), (0.61, "ppo"), (0.95, "eval"), (0.9999999999999999, "eval")],
)
def test_split_of_by_hand(share: float, name: str) -> None:
    assert prepare.split_of(share, SPLITS) == name


def test_a_share_of_nothing_is_an_empty_split() -> None:
    with pytest.raises(UserError, match=r"the split `eval` is empty.*prepare\.splits\.eval = 0\. Raise"):
        prepare.split_prompts(ids_of(ROWS), Splits(sft=0.4, reward=0.3, ppo=0.3, eval=0.0), seed=1)


def test_too_few_rows_leave_a_split_empty(run_prepare: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        run_prepare(ROWS[:2])
    assert not (tmp_path / "data/prepared").exists()


def test_a_long_prompt_names_file_line_and_limit(run_prepare: Callable[..., dict[str, Any]]) -> None:
    long = ROWS[3].model_copy(update={"prompt": "word " * 65})
    with pytest.raises(
        UserError, match=r"tickets\.jsonl, line 4: the prompt has 65 tokens, and text\.max_prompt_tokens is 64"
    ):
        run_prepare([*ROWS[:3], long, *ROWS[4:]])


def test_an_empty_prompt(run_prepare: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"line 2: the prompt is empty"):
        run_prepare([ROWS[0], ROWS[1].model_copy(update={"prompt": " \n"}), *ROWS[2:]])


def test_a_limit_beyond_the_model(run_prepare: Callable[..., dict[str, Any]]) -> None:
    assert run_prepare(ROWS, positions=160)  # 64 + 64 + 32
    with pytest.raises(UserError, match="is 160 tokens, and the model takes 159"):
        run_prepare(ROWS, positions=159)


def test_no_raw_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no tickets")
    with pytest.raises(UserError, match=r"holds no \*\.jsonl file"):
        prepare.read_tickets(tmp_path)


def test_a_torn_row_names_file_line_and_field(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS[:2])
    write_rows(tmp_path / "b.jsonl", ROWS[2:4])
    whole = (tmp_path / "b.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text(whole[:-40])
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: .*JSON"):
        prepare.read_tickets(tmp_path)
    (tmp_path / "b.jsonl").write_text(whole.replace('"signer"', '"signed"', 1))
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: ticket\.signe"):
        prepare.read_tickets(tmp_path)


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", ROWS[2:4])
    write_rows(tmp_path / "a.jsonl", ROWS[:2])
    found: list[Row] = [row for _, _, row in prepare.read_tickets(tmp_path)]
    assert found == ROWS[:4]
    assert [(file.name, line) for file, line, _ in prepare.read_tickets(tmp_path)][2:] == [
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]
