"""Evaluation: wins and intervals by hand, the report's keys, and the stage on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tasks.datasets import Prompt, PromptTicket, SideBySide, Ticket, prompt_id, read_rows, write_rows
from tasks.evaluate import (
    MODELS,
    Answers,
    answer_all,
    flatten,
    join,
    judge,
    run,
    side_by_side,
    summarize,
)
from tasks.intervals import wins, with_interval
from tasks.labels.gold import WEIGHTS, gold_score
from tasks.lineage import load_stages
from tasks.models import encode_prompt, load_language_model, load_scalar_model, load_tokenizer, save_model, split_model
from tasks.params import load_params
from tasks.ppo.rollout import generate, uniforms_for
from tasks.stage import Stage, UserError
from tasks.tickets import generate as generate_tickets
from tests.tiny import tiny_model_dir

DEFAULTS = load_params(Path("params.yaml"))
PARAMS = DEFAULTS.model_copy(
    update={
        "evaluate": DEFAULTS.evaluate.model_copy(update={"prompts": 6, "batch_size": 4, "bootstrap_samples": 50}),
        "text": DEFAULTS.text.model_copy(update={"max_response_tokens": 8}),
    }
)
RAW = generate_tickets(seed=1, count=8)
PROMPTS = [Prompt(id=prompt_id(row.prompt), prompt=row.prompt) for row in RAW]
TICKETS = [row.ticket for row in RAW]

# The names in the issue, which the product's promise is written in, and what else the report says.
PROMISED = {
    *("gold.base", "gold.sft", "gold.policy", "gold.gain", "gold.gain_low", "gold.gain_high"),
    *("win_rate", "win_rate_low", "win_rate_high", "kl", "fluency.sft", "fluency.policy"),
}


# ---- figures ----


def test_wins_by_hand() -> None:
    ours = torch.tensor([1.0, 0.2, 0.5, 0.5 + 1e-8, 0.5001])
    theirs = torch.tensor([0.0, 0.9, 0.5, 0.5, 0.5])
    assert wins(ours, theirs).tolist() == [1.0, 0.0, 0.5, 0.5, 1.0]


def test_interval_by_hand() -> None:
    # resampled means of (0, 4, 8): 0, 4, 8, 4 and (0 + 0 + 4) / 3
    picks = torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 1, 2], [0, 0, 1]])
    figures = with_interval("x", torch.tensor([0.0, 4.0, 8.0]), picks)
    # sorted: 0, 4/3, 4, 4, 8; 2.5 % is a tenth of the way from the first to the second, 97.5 % nine tenths of the way
    # from the fourth to the fifth
    assert figures == pytest.approx({"x": 4.0, "x_low": 0.1 * 4 / 3, "x_high": 4 + 0.9 * 4}, abs=1e-5)


def test_interval_is_numpys_percentile() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, generator=generator)
    picks = torch.randint(40, (500, 40), generator=generator)
    figures = with_interval("x", values, picks)
    means = values.numpy()[picks.numpy()].mean(1)
    assert figures["x"] == pytest.approx(values.mean().item())
    assert figures["x_low"] == pytest.approx(np.percentile(means, 2.5), abs=1e-6)
    assert figures["x_high"] == pytest.approx(np.percentile(means, 97.5), abs=1e-6)
    # the interval that theory gives for a mean: 1.96 standard errors on each side
    assert figures["x_high"] - figures["x_low"] == pytest.approx(2 * 1.96 * values.std().item() / 40**0.5, rel=0.1)


def test_flatten() -> None:
    assert flatten({"gold": {"sft": 1.0, "checks": {"name": 2.0}}, "kl": 3.0}) == {
        "gold.sft": 1.0,
        "gold.checks.name": 2.0,
        "kl": 3.0,
    }


def answers_with(gold: list[float], score: list[float], kl: list[float]) -> Answers:
    count = len(gold)
    parts = {part: torch.full((count,), 0.5) for part in WEIGHTS}
    ended = torch.tensor([1.0] * (count - 1) + [0.0])
    return Answers(
        texts=[f"text {gold[0]} {n}" for n in range(count)],
        parts=parts,
        gold=torch.tensor(gold),
        score=torch.tensor(score),
        fluency=torch.tensor(gold) - 3,
        kl=torch.tensor(kl),
        length=torch.full((count,), 7.0),
        ended=ended,
    )


FAKE = {
    "base": answers_with([0.1, 0.2, 0.3, 0.2], [0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]),
    "sft": answers_with([0.5, 0.6, 0.7, 0.6], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]),
    "policy": answers_with([0.9, 0.6, 0.6, 0.9], [2.0, 3.0, 4.0, 0.0], [1.0, 2.0, 3.0, 4.0]),
}


def test_summary_by_hand() -> None:
    figures = flatten(summarize(FAKE, seed=1, times=200))
    assert set(figures) >= PROMISED
    by_hand = {
        "prompts": 4,
        **{"gold.base": 0.2, "gold.sft": 0.6, "gold.policy": 0.75},
        "gold.gain": 0.15,  # (0.4 + 0 - 0.1 + 0.3) / 4
        "win_rate": 0.625,  # a win, a draw, a loss, a win
        "score_win_rate": 0.75,
        **{"score.gain": 1.25, "kl": 2.5},
        **{"fluency.sft": -2.4, "fluency.policy": -2.25},
        **{"length.sft": 7.0, "ended.policy": 0.75, "checks.fluency.base": 0.5},
    }
    assert {name: figures[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-6)
    for name in ("gold.gain", "gold.sft", "win_rate", "kl", "score.policy"):
        assert figures[f"{name}_low"] < figures[name] + 1e-6
        assert figures[f"{name}_low"] <= figures[f"{name}_high"]
    assert figures["gold.gain_low"] < 0.15 < figures["gold.gain_high"]


def test_the_intervals_are_paired() -> None:
    """A gain that is the same on every prompt is certain, however much the prompts differ."""
    sft = answers_with([0.1, 0.5, 0.9, 0.3], [0.0] * 4, [0.0] * 4)
    policy = sft._replace(gold=sft.gold + 0.05)
    figures = summarize({"base": sft, "sft": sft, "policy": policy}, seed=1, times=100)["gold"]
    assert figures["gain_low"] == pytest.approx(0.05, abs=1e-6)
    assert figures["gain_high"] == pytest.approx(0.05, abs=1e-6)
    assert figures["sft_high"] - figures["sft_low"] > 0.1


def test_judge_adds_the_gold_score() -> None:
    texts = [f"Dear {TICKETS[0].customer}, sorry.", "no"]
    fluency = torch.tensor([-2.5, -9.0])
    zeros = torch.zeros(2)
    answers = judge(texts, TICKETS[:2], zeros, fluency, zeros, torch.tensor([5, 8]), torch.tensor([True, False]))
    expected = [gold_score(*row) for row in zip(texts, TICKETS[:2], fluency.tolist(), strict=True)]
    assert answers.gold.tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[0] > expected[1]
    assert set(answers.parts) == set(WEIGHTS)
    # fluency's mark: a line from 0 at -5 to 1 at -2
    assert answers.parts["fluency"].tolist() == pytest.approx([2.5 / 3, 0.0], abs=1e-6)
    assert answers.ended.tolist() == [1.0, 0.0]
    assert answers.length.tolist() == [5.0, 8.0]


def test_join_puts_batches_one_after_the_other() -> None:
    joined = join([FAKE["sft"], FAKE["policy"]])
    assert joined.texts == FAKE["sft"].texts + FAKE["policy"].texts
    assert joined.gold.tolist() == [*FAKE["sft"].gold.tolist(), *FAKE["policy"].gold.tolist()]
    assert joined.kl.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    assert joined.parts["fluency"].shape == (8,)


def test_side_by_side() -> None:
    row = side_by_side(PROMPTS[:4], FAKE)[2]
    assert (row.prompt, row.base, row.policy) == (PROMPTS[2].prompt, "text 0.1 2", "text 0.9 2")
    assert row.scores == {
        **{"gold.base": 0.3, "gold.sft": 0.7, "gold.policy": 0.6},
        **{"score.base": 0.0, "score.sft": 1.0, "score.policy": 4.0},
    }


# ---- on tiny models ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base, an SFT model and a policy with another top block, and a reward model on the same lowest block."""
    root = tmp_path_factory.mktemp("evaluate")
    texts = [row.prompt for row in RAW]
    base = load_language_model(tiny_model_dir(root / "start", seed=3, texts=texts))
    tokenizer = load_tokenizer(root / "start")
    base.model.embed_tokens.weight.data[2] *= 2.5
    save_model(base, tokenizer, root / "base")
    for seed, name in enumerate(("sft", "policy")):
        model = load_language_model(root / "base")
        generator = torch.Generator().manual_seed(seed)
        for weight in model.model.layers[1].parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        save_model(model, tokenizer, root / name)
    reward = load_scalar_model(tiny_model_dir(root / "other", seed=4, reward=True, texts=texts))
    reward.model.embed_tokens.load_state_dict(base.model.embed_tokens.state_dict())
    reward.model.layers[0].load_state_dict(base.model.layers[0].state_dict())
    save_model(reward, tokenizer, root / "reward")
    return {name: root / name for name in (*MODELS, "reward")}


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path]) -> dict[str, Answers]:
    return answer_all(folders, PROMPTS[:6], TICKETS[:6], PARAMS)


def plain_logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), response]


def test_every_figure_is_that_of_plain_forward_passes(folders: dict[str, Path], answers: dict[str, Answers]) -> None:
    """The models share a trunk in `answer_all`; here each answer goes through each whole model alone."""
    tokenizer = load_tokenizer(folders["base"])
    models = {name: load_language_model(folders[name]) for name in MODELS}
    reward_model = load_scalar_model(folders["reward"])
    uniforms = uniforms_for(PARAMS.seed, [f"evaluate {row.id}" for row in PROMPTS[:6]], 8)
    for name in MODELS:
        found = answers[name]
        for row in range(6):
            prompt = encode_prompt(tokenizer, PROMPTS[row].prompt)
            rollout = generate(
                *split_model(models[name], 0),
                [prompt],
                uniforms[row : row + 1],
                max_new_tokens=8,
                end_token=tokenizer.eos_token_id,
                pad_token=tokenizer.pad_token_id,
            )
            (response,) = rollout.response_ids()
            assert found.texts[row] == tokenizer.decode(response, skip_special_tokens=True).strip()
            logprobs = {other: plain_logprobs(models[other], prompt, response) for other in MODELS}
            assert_close(found.fluency[row], logprobs["base"].mean(), rtol=0, atol=1e-4)
            if name == "policy":
                assert_close(found.kl[row], (logprobs[name] - logprobs["sft"]).sum(), rtol=0, atol=1e-4)
            with torch.no_grad():
                score = reward_model(input_ids=torch.tensor([prompt + response])).logits[0, 0] - 0.25
            assert_close(found.score[row], score, rtol=0, atol=1e-4)
            assert found.length[row] == len(response)
            assert found.ended[row] == (response[-1] == tokenizer.eos_token_id)
            gold = gold_score(found.texts[row], TICKETS[row], found.fluency[row].item())
            assert found.gold[row].item() == pytest.approx(gold, abs=1e-5)
    assert answers["policy"].kl.abs().max() > 0.1
    assert answers["sft"].texts != answers["policy"].texts


def test_answers_do_not_depend_on_which_other_prompts_there_are(
    folders: dict[str, Path], answers: dict[str, Answers]
) -> None:
    some = answer_all(folders, [PROMPTS[4], PROMPTS[1]], [TICKETS[4], TICKETS[1]], PARAMS)
    for name in MODELS:
        assert some[name].texts == [answers[name].texts[4], answers[name].texts[1]]


def run_stage(root: Path, folders: dict[str, Path]) -> tuple[dict[str, Any], Mock]:
    for name, folder in folders.items():
        (root / "data/models").mkdir(parents=True, exist_ok=True)
        (root / f"data/models/{name}").symlink_to(folder)
    write_rows(root / "data/prepared/prompts/eval.jsonl", PROMPTS)
    facts: list[tuple[Prompt, Ticket]] = list(zip(PROMPTS, TICKETS, strict=True))[::-1]
    write_rows(root / "data/prepared/tickets.jsonl", [PromptTicket(id=p.id, ticket=ticket) for p, ticket in facts])
    tracker = Mock()
    stage = Stage(load_stages()["evaluate"], PARAMS, tracker, root=root)
    run(stage)
    stage.commit()
    return json.loads((root / "data/reports/evaluation/metrics.json").read_text()), tracker


def test_the_stage_and_its_report(folders: dict[str, Path], answers: dict[str, Answers], tmp_path: Path) -> None:
    report, tracker = run_stage(tmp_path / "one", folders)
    figures = flatten(report)
    assert set(figures) >= PROMISED
    assert report == summarize(answers, PARAMS.seed, 50)
    path = tmp_path / "one/data/reports/evaluation/samples.jsonl"
    rows = read_rows(path, SideBySide)
    assert [row.prompt for row in rows] == [prompt.prompt for prompt in PROMPTS[:6]]
    assert [row.policy for row in rows] == answers["policy"].texts
    (logged,), _ = tracker.metrics.call_args
    assert logged == {f"eval/{name}": value for name, value in figures.items()}
    assert "eval/win_rate" in logged

    again, _ = run_stage(tmp_path / "two", folders)
    assert again == report
    assert (tmp_path / "two/data/reports/evaluation/samples.jsonl").read_bytes() == path.read_bytes()


def test_an_identical_policy_gains_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    report, _ = run_stage(tmp_path, {**folders, "policy": folders["sft"]})
    figures = flatten(report)
    for name in ("gold.gain", "gold.gain_low", "gold.gain_high", "score.gain"):
        assert figures[name] == 0, name
    for name in ("win_rate", "win_rate_low", "win_rate_high", "score_win_rate"):
        assert figures[name] == 0.5, name
    assert figures["kl"] == pytest.approx(0, abs=1e-5)
    assert figures["fluency.policy"] == figures["fluency.sft"]


def test_more_prompts_than_there_are(folders: dict[str, Path], tmp_path: Path) -> None:
    few = PARAMS.evaluate.model_copy(update={"prompts": 9})
    write_rows(tmp_path / "data/prepared/prompts/eval.jsonl", PROMPTS)
    (tmp_path / "data/models").mkdir(parents=True)
    for name, folder in folders.items():
        (tmp_path / f"data/models/{name}").symlink_to(folder)
    stage = Stage(load_stages()["evaluate"], PARAMS.model_copy(update={"evaluate": few}), Mock(), root=tmp_path)
    with pytest.raises(UserError, match=r"evaluate\.prompts is 9, and the eval split has 8 prompts"):
        run(stage)


def test_models_of_different_tokenizers_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_model_dir(tmp_path / "other")
    with pytest.raises(UserError, match="different tokenizers"):
        run_stage(tmp_path / "repo", {**folders, "policy": other})
