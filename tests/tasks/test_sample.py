"""Sampling outputs for the labelers: the same for a sub-set, duplicates dropped and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tasks.conversations import single
from tasks.datasets import Prompt, Samples, prompt_id, read_figures, read_rows, write_rows
from tasks.lineage import load_stages
from tasks.models import load_language_model, load_tokenizer, save_model
from tasks.params import Params, load_params
from tasks.sample import run, sample_responses
from tasks.stage import Stage, UserError
from tests.tiny import CONVERSATION, give_fingerprint, tiny_model_dir

TEXTS = ["hello dear", "your order is late", "refund", "we are sorry and will refund it by monday", "ticket 7", "is it"]
PROMPTS = [Prompt(id=prompt_id(single(text)), prompt=single(text)) for text in TEXTS]
DEFAULTS = load_params(Path("params.yaml"))


def params_with(**changes: Any) -> Params:
    settings = {"prompts": 6, "responses_per_prompt": 3, "temperature": 1.0, "batch_size": 9, **changes}
    return DEFAULTS.model_copy(
        update={
            "sample": DEFAULTS.sample.model_copy(update=settings),
            "text": DEFAULTS.text.model_copy(update={"max_response_tokens": 6}),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that sometimes ends within six tokens."""
    root = tmp_path_factory.mktemp("sample")
    model = load_language_model(tiny_model_dir(root / "start", seed=3))
    model.model.embed_tokens.weight.data[2] *= 2.5
    save_model(model, load_tokenizer(root / "start"), root / "sft")
    return root / "sft"


def sample(folder: Path, prompts: list[Prompt], params: Params) -> tuple[list[Samples], int]:
    return sample_responses(load_language_model(folder), load_tokenizer(folder), prompts, params)


def test_every_prompt_gets_its_responses_in_order(folder: Path) -> None:
    samples, dropped = sample(folder, PROMPTS, params_with())
    assert dropped == 0
    assert [(row.id, row.prompt) for row in samples] == [(prompt.id, prompt.prompt) for prompt in PROMPTS]
    for row in samples:
        assert len(row.responses) == len(row.ended) == len(set(row.responses)) == 3
    assert len({flag for row in samples for flag in row.ended}) == 2


def test_a_subset_gets_the_outputs_that_the_whole_gets(folder: Path) -> None:
    whole, _ = sample(folder, PROMPTS, params_with())
    some, _ = sample(folder, [PROMPTS[4], PROMPTS[1]], params_with())
    assert some == [whole[4], whole[1]]


@pytest.mark.parametrize("batch_size", [1, 6, 100])
def test_the_batch_size_does_not_change_the_outputs(folder: Path, batch_size: int) -> None:
    assert sample(folder, PROMPTS, params_with(batch_size=batch_size)) == sample(folder, PROMPTS, params_with())


def test_fewer_responses_are_the_first_of_more(folder: Path) -> None:
    three, _ = sample(folder, PROMPTS, params_with())
    two, _ = sample(folder, PROMPTS, params_with(responses_per_prompt=2))
    assert [row.responses for row in two] == [row.responses[:2] for row in three]


def test_the_seed_changes_the_outputs(folder: Path) -> None:
    params = params_with()
    assert sample(folder, PROMPTS, params) != sample(folder, PROMPTS, params.model_copy(update={"seed": 2}))


def test_duplicates_are_dropped_and_counted(folder: Path) -> None:
    """At a low temperature some responses repeat, and two prompts get the same one six times."""
    samples, dropped = sample(folder, PROMPTS, params_with(responses_per_prompt=6, temperature=0.05))
    for row in samples:
        assert 1 < len(set(zip(row.responses, row.ended, strict=True))) == len(row.responses)
    left_out = len(PROMPTS) - len(samples)
    assert left_out == 2
    # of six equal responses five are duplicates
    assert dropped == 36 - sum(len(row.responses) for row in samples) - left_out > 10


def test_without_a_difference_there_is_nothing_to_rank(folder: Path) -> None:
    with pytest.raises(UserError, match=r"same response each time: raise sample\.temperature"):
        sample(folder, PROMPTS[:2], params_with(temperature=1e-4))


def test_every_turn_of_a_conversation_is_seen(folder: Path) -> None:
    """The same random numbers, for the id is the same: what differs comes of the turns."""
    versions = [CONVERSATION, CONVERSATION[1:], CONVERSATION[:1] + CONVERSATION[3:], CONVERSATION[3:]]
    found = [sample(folder, [Prompt(id="one", prompt=turns)], params_with())[0][0] for turns in versions]
    assert [row.prompt for row in found] == versions
    assert len({tuple(row.responses) for row in found}) == 4


# ---- stage ----


def run_stage(root: Path, folder: Path, params: Params, fingerprint: Path | None = None) -> Mock:
    write_rows(root / "data/prepared/prompts/reward.jsonl", PROMPTS)
    (root / "data/models").mkdir(parents=True)
    (root / "data/models/sft").symlink_to(folder)
    give_fingerprint(fingerprint or folder, root / "data/prepared")
    tracker = Mock()
    stage = Stage(load_stages()["sample"], params, tracker, root=root)
    run(stage)
    stage.commit()
    return tracker


def test_the_stage_and_its_report(folder: Path, tmp_path: Path) -> None:
    tracker = run_stage(tmp_path / "one", folder, params_with(prompts=4))
    path = tmp_path / "one/data/collected/samples/samples.jsonl"
    rows = read_rows(path, Samples)
    assert rows == sample(folder, PROMPTS[:4], params_with())[0]
    figures = read_figures((tmp_path / "one/data/reports/sample/metrics.json").read_text(encoding="utf-8"))["sample"]
    ended = [flag for row in rows for flag in row.ended]
    assert figures == {"prompts": 4, "responses": 12, "duplicates_dropped": 0, "ended_share": sum(ended) / 12}
    (logged,), _ = tracker.metrics.call_args
    assert logged == {f"sample/{name}": value for name, value in figures.items()}
    name, table = tracker.table.call_args.args
    assert name == "samples"
    assert table[0] == {"prompt": TEXTS[0], "response": rows[0].responses[0]}

    torch.manual_seed(9)  # nothing depends on the global generator
    run_stage(tmp_path / "two", folder, params_with(prompts=4))
    assert (tmp_path / "two/data/collected/samples/samples.jsonl").read_bytes() == path.read_bytes()


def test_more_prompts_than_there_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sample\.prompts is 7, and the reward split has 6 prompts"):
        run_stage(tmp_path, folder, params_with(prompts=7))


def test_nothing_is_sampled_where_rankings_are_recorded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = params_with()
    params = params.model_copy(update={"rank": params.rank.model_copy(update={"labeler": "recorded"})})
    run_stage(tmp_path, folder, params)
    assert (tmp_path / "data/collected/samples/samples.jsonl").read_bytes() == b""
    figures = read_figures((tmp_path / "data/reports/sample/metrics.json").read_text(encoding="utf-8"))["sample"]
    assert figures == {"prompts": 0, "responses": 0, "duplicates_dropped": 0}
    assert "nothing is sampled, for rank.labeler is `recorded`" in capsys.readouterr().out


def test_prompts_prepared_for_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = tiny_model_dir(tmp_path / "other", texts=["other"])
    with pytest.raises(UserError, match=r"data/prepared: \w+, .*data/models/sft: "):
        run_stage(tmp_path / "repo", folder, params_with(), fingerprint=other)
