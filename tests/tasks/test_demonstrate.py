"""Who answers which prompt, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tasks.conversations import single
from tasks.datasets import Demonstration, Prompt, PromptFacts, prompt_id, read_figures, read_rows, write_rows
from tasks.demonstrate import choose_prompts, run
from tasks.labels.judgments import WrittenDemonstration
from tasks.labels.queue import queue_files
from tasks.lineage import load_stages
from tasks.params import load_params
from tasks.stage import Stage, UserError, WaitsForPeopleError
from tasks.tickets import generate
from tests.judged import wrote
from tests.tiny import CONVERSATION, tiny_model_dir, tiny_tokenizer

ROWS = generate(seed=9, count=200)
PROMPTS = [Prompt(id=prompt_id(single(row.prompt)), prompt=single(row.prompt)) for row in ROWS]


def run_stage(
    root: Path,
    prompts: list[Prompt],
    count: int,
    recorded: list[Demonstration] | None = None,
    facts: list[PromptFacts] | None = None,
    written: list[WrittenDemonstration] | None = None,
    **human: Any,
) -> tuple[list[Demonstration], dict[str, Any]]:
    """recorded: what came with the raw data, to be taken instead of simulated people's. written: by people on the page,
    with the settings `human`."""
    write_rows(root / "data/prepared/prompts/sft.jsonl", prompts)
    tickets = [PromptFacts(id=prompt_id(single(row.prompt)), source="tickets", ticket=row.ticket) for row in ROWS]
    write_rows(root / "data/prepared/facts.jsonl", facts or tickets)
    write_rows(root / "data/prepared/demonstrations/sft.jsonl", recorded or [])
    write_rows(root / "data/labels/demonstrations.jsonl", written or [])
    (root / "data/prepared/tokenizer_fingerprint.txt").write_text("0123abcd\n")
    params = load_params(Path("params.yaml"))
    settings = {
        "prompts": count,
        "labeler": "human" if human else "simulated" if recorded is None else "recorded",
        "human": params.demonstrate.human.model_copy(update=human),
    }
    params = params.model_copy(update={"demonstrate": params.demonstrate.model_copy(update=settings)})
    (root / "data/models").mkdir(exist_ok=True)
    if human:
        tiny_model_dir(root / "data/models/base")
    stage = Stage(load_stages()["demonstrate"], params, Mock(), root=root)
    run(stage)
    stage.commit()
    rows = read_rows(root / "data/collected/demonstrations/demonstrations.jsonl", Demonstration)
    return rows, read_figures((root / "data/reports/demonstrate/metrics.json").read_text(encoding="utf-8"))[
        "demonstrate"
    ]


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


# ---- people ----


def answers(prompts: list[Prompt], labeler: str = "ann") -> list[WrittenDemonstration]:
    return [wrote(row.prompt, labeler, f"dear {labeler}") for row in prompts]


def test_it_waits_until_people_have_answered_and_goes_on(tmp_path: Path) -> None:
    """Among prompts that are no tickets: people can answer any."""
    prompts = [Prompt(id=prompt_id(single(f"poem {n}")), prompt=single(f"poem {n}")) for n in range(6)]
    facts = [PromptFacts(id=row.id, source="mine", ticket=None) for row in prompts]
    chosen = choose_prompts(prompts, 4, seed=1)
    some = [*answers(chosen[:2]), wrote(chosen[2].prompt, "ann", None)]
    with pytest.raises(WaitsForPeopleError, match="2 demonstrations by people are missing: 2 of 4 items are done"):
        run_stage(tmp_path / "some", prompts, 4, facts=facts, written=some, labels=1)
    assert queue_files(tmp_path / "some")
    run_stage(tmp_path / "some", PROMPTS, 4)
    assert queue_files(tmp_path / "some") == [], "nobody should write for simulated labelers"
    rows, metrics = run_stage(tmp_path / "all", prompts, 4, facts=facts, written=answers(prompts), labels=1)
    assert [(row.id, row.response, row.labeler) for row in rows] == [(row.id, "dear ann", "ann") for row in chosen]
    assert (metrics["by_people"], metrics["by_simulated"], metrics["flawed_share"]) == (4, 0, None)
    assert metrics["other_judgments"] == 2, "of the prompts that were not chosen"
    assert metrics["people"] == {
        "by_labeler": {"ann": {"demonstrations": 4, "skips": 0, "median_seconds": 30.0, "median_words": 2.0}},
        "skip_reasons": {},
    }


def test_two_people_on_one_prompt_and_one_who_is_left_out(tmp_path: Path) -> None:
    written = [row for name in ("ann", "bo", "cy") for row in answers(PROMPTS[:3], name)]
    rows, metrics = run_stage(tmp_path, PROMPTS[:3], 3, written=written, labels=2, leave_out=["cy"])
    assert metrics["by_labeler"] == {"ann": 3, "bo": 3}
    assert (metrics["left_out_judgments"], len(rows)) == (3, 6)


def test_simulated_labelers_fill_in_and_are_called_so(tmp_path: Path) -> None:
    chosen = choose_prompts(PROMPTS, 20, seed=1)
    simulated, _ = run_stage(tmp_path / "simulated", PROMPTS, 20)
    rows, metrics = run_stage(tmp_path / "filled", PROMPTS, 20, written=answers(chosen[:5]), fill_in=True)
    assert [row.labeler for row in rows[:5]] == ["ann"] * 5
    assert rows[5:] == [row.model_copy(update={"labeler": f"simulated:{row.labeler}"}) for row in simulated[5:]]
    assert (metrics["by_people"], metrics["by_simulated"], metrics["missing_judgments"]) == (5, 15, 15)
    assert sum(count for name, count in metrics["by_labeler"].items() if name.startswith("simulated:")) == 15
    whole, metrics = run_stage(tmp_path / "whole", PROMPTS, 20, written=answers(chosen), fill_in=True)
    assert (len(whole), metrics["by_simulated"]) == (20, 0), "nothing is left to fill in"


def test_what_cannot_be_filled_in_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = [Prompt(id=prompt_id(single(text)), prompt=single(text)) for text in ("a poem, please", "2 + 2")]
    tickets = [PromptFacts(id=p.id, source="tickets", ticket=row.ticket) for p, row in zip(PROMPTS, ROWS, strict=True)]
    facts = [PromptFacts(id=row.id, source="mine", ticket=None) for row in foreign]
    rows, metrics = run_stage(tmp_path / "some", [*foreign, *PROMPTS[:3]], 5, facts=tickets + facts, fill_in=True)
    assert (len(rows), metrics["without_ticket"]) == (3, 2)
    assert "2 more have no answer and no ticket to answer by" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no demonstration to train on: people answered none of the 2 prompts"):
        run_stage(tmp_path / "none", foreign, 2, facts=facts, fill_in=True)


def test_what_is_longer_than_a_response_may_be_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that fits to the token, and one with a token more."""
    limit = load_params(Path("params.yaml")).text.max_response_tokens - 1
    tokenizer = tiny_tokenizer()

    def text(tokens: int) -> str:
        found = "#" * tokens
        assert len(tokenizer(found, add_special_tokens=False).input_ids) == tokens
        return found

    written = [wrote(PROMPTS[0].prompt, "ann", text(limit)), wrote(PROMPTS[1].prompt, "bo", text(limit + 1))]
    rows, metrics = run_stage(tmp_path, PROMPTS[:2], 2, written=written, labels=1)
    assert [row.labeler for row in rows] == ["ann"]
    assert (metrics["too_long"], metrics["by_people"]) == (1, 1)
    assert f"bo's answer to item {written[1].item} has {limit + 1} tokens and is not used" in capsys.readouterr().out


def test_peoples_work_that_is_not_used_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_stage(tmp_path / "simulated", PROMPTS, 10, written=answers(PROMPTS[:3]))
    assert "3 lines of data/labels/demonstrations.jsonl are not used, for demonstrate.labeler is simulated" in (
        capsys.readouterr().out
    )
    run_stage(tmp_path / "recorded", PROMPTS, 10, recorded=RECORDED, written=answers(PROMPTS[:3]))
    assert "not used, for demonstrate.labeler is recorded" in capsys.readouterr().out
    run_stage(tmp_path / "human", PROMPTS[:3], 3, recorded=RECORDED, written=answers(PROMPTS[:3]), labels=1)
    assert "3 demonstrations came with the data and are not used, for demonstrate.labeler is human" in (
        capsys.readouterr().out
    )


def test_too_few_prompts_for_people(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the split sft holds 3 prompts for people to answer"):
        run_stage(tmp_path, PROMPTS[:3], 4, labels=1)
