"""Evaluation: wins and intervals by hand, the report's keys, and the stage on tiny models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks import baseline
from tasks.conversations import single
from tasks.datasets import (
    Answer,
    HeldOutAnswer,
    Prompt,
    PromptFacts,
    SideBySide,
    Ticket,
    flat,
    prompt_id,
    read_figures,
    read_rows,
    write_json,
    write_rows,
)
from tasks.evaluate import (
    MODELS,
    Answers,
    by_slice,
    judge,
    over_optimisation,
    own_words,
    repetition,
    run,
    side_by_side,
    summarize,
)
from tasks.intervals import length_thirds, resamples, wins, with_interval
from tasks.labels.gold import WEIGHTS, gold_score
from tasks.lineage import hash_path, load_stages
from tasks.models import encode_prompt, load_language_model, load_scalar_model, load_tokenizer, save_model, split_model
from tasks.panel import Panel
from tasks.params import Params, load_params
from tasks.ppo.rollout import generate, uniforms_for
from tasks.stage import Stage, UserError
from tasks.tickets import generate as generate_tickets
from tests.tiny import CONVERSATION, give_fingerprint, tiny_model_dir

DEFAULTS = load_params(Path("params.yaml"))
PARAMS = DEFAULTS.model_copy(
    update={
        "baseline": DEFAULTS.baseline.model_copy(
            update={"prompts": 6, "batch_size": 4, "best_of": 4, "best_of_prompts": 2}
        ),
        "evaluate": DEFAULTS.evaluate.model_copy(update={"bootstrap_samples": 50}),
        "text": DEFAULTS.text.model_copy(update={"max_response_tokens": 8}),
    }
)
RAW = generate_tickets(seed=1, count=8)
TEXTS = [row.prompt for row in RAW]
PROMPTS = [Prompt(id=prompt_id(single(text)), prompt=single(text)) for text in TEXTS]
TICKETS = [row.ticket for row in RAW]
FACTS: dict[str, Ticket | None] = {prompt.id: ticket for prompt, ticket in zip(PROMPTS, TICKETS, strict=True)}
NO_FACTS: dict[str, Ticket | None] = dict.fromkeys(FACTS)

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


def test_flat() -> None:
    assert flat({"gold": {"sft": 1.0, "checks": {"name": 2.0}}, "kl": 3.0}) == {
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
        repetition=torch.tensor(score) / 4,
        relevance=torch.tensor(score) / 4,
    )


FAKE = {
    "base": answers_with([0.1, 0.2, 0.3, 0.2], [0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]),
    "sft": answers_with([0.5, 0.6, 0.7, 0.6], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]),
    "policy": answers_with([0.9, 0.6, 0.6, 0.9], [2.0, 3.0, 4.0, 0.0], [1.0, 2.0, 3.0, 4.0]),
}


def test_summary_by_hand() -> None:
    figures = flat(summarize(FAKE, seed=1, times=200))
    assert set(figures) >= PROMISED
    by_hand = {
        "prompts": 4,
        **{"gold.base": 0.2, "gold.sft": 0.6, "gold.policy": 0.75},
        "gold.gain": 0.15,  # (0.4 + 0 - 0.1 + 0.3) / 4
        "win_rate": 0.625,  # a win, a draw, a loss, a win
        "score_win_rate": 0.75,
        "overrated": 0.125,
        "gold.prompts": 4,
        **{"score.gain": 1.25, "kl": 2.5},
        **{"fluency.sft": -2.4, "fluency.policy": -2.25},
        **{"length.sft": 7.0, "ended.policy": 0.75, "checks.fluency.base": 0.5},
        "kl_standard_error": (5 / 3) ** 0.5 / 2,  # of 1, 2, 3, 4
        **{"versus.sft.gold.win": 0.5, "versus.sft.gold.tie": 0.25, "versus.sft.gold.loss": 0.25},
        **{"versus.sft.score.win": 0.75, "versus.base.gold.win_rate": 1.0, "versus.base.score.tie": 0.25},
        "repetition.policy": 9 / 16,
    }
    assert {name: figures[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-6)
    for name in ("gold.gain", "gold.sft", "win_rate", "kl", "score.policy"):
        assert figures[f"{name}_low"] < figures[name] + 1e-6
        assert figures[f"{name}_low"] <= figures[f"{name}_high"]
    assert figures["gold.gain_low"] < 0.15 < figures["gold.gain_high"]


def without_gold(answers: Answers, *rows: int) -> Answers:
    """These prompts have no ticket."""
    gold = answers.gold.clone()
    gold[list(rows)] = torch.nan
    return answers._replace(gold=gold, parts={part: marks + 0 * gold for part, marks in answers.parts.items()})


def test_without_a_gold_score_the_rest_is_measured_and_nothing_is_made_up() -> None:
    none = {model: without_gold(found, 0, 1, 2, 3) for model, found in FAKE.items()}
    figures = flat(summarize(none, seed=1, times=200))
    by_gold = ("gold", "win_rate", "checks", "overrated")
    everything = flat(summarize(FAKE, seed=1, times=200))
    assert figures == {
        name: value for name, value in everything.items() if not name.startswith(by_gold) and ".gold." not in name
    }
    slices = by_slice(none, {"x": ["a", "a", "b", "b"]}, seed=1, times=50)
    assert [sorted(row) for row in slices] == [
        ["kl", "kl_high", "kl_low", "prompts", "score_gain", "score_gain_high", "score_gain_low", "slice"]
    ] * 2
    assert slices[0]["score_gain"] == 1.5  # 1 and 2
    assert set(side_by_side(TEXTS[:4], none)[0].scores) == {"score.base", "score.sft", "score.policy"}


def test_where_some_prompts_have_no_ticket_gold_is_over_the_others() -> None:
    mixed = {model: without_gold(found, 1) for model, found in FAKE.items()}
    figures = flat(summarize(mixed, seed=1, times=200))
    by_hand = {
        **{"prompts": 4, "gold.prompts": 3, "gold.sft": 0.6, "gold.policy": 0.8, "gold.gain": 0.2},
        "win_rate": 2 / 3,  # a win, a loss, a win
        "score_win_rate": 0.75,  # of all four
        "overrated": 0.0,  # of the three: the score wins two, and another two are the gold score's
        **{"versus.sft.gold.loss": 1 / 3, "versus.sft.score.win": 0.75, "checks.fluency.base": 0.5},
    }
    assert {name: figures[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-6)
    assert not any(math.isnan(value) for value in figures.values())
    alone, both = by_slice(mixed, {"kind": ["late", None, "late", None], "x": ["a"] * 4}, seed=1, times=50)
    assert (alone["slice"], alone["prompts"], alone["gold.prompts"]) == ("kind: late", 2, 2)
    assert (both["prompts"], both["gold.prompts"]) == (4, 3)
    assert both["gain"] == pytest.approx(0.2)
    assert "gold.policy" not in side_by_side(TEXTS[:4], mixed)[1].scores


def test_own_words_are_those_that_few_prompts_have() -> None:
    prompts = [f"Order {number}: the kettle is late" for number in range(20)]
    prompts[3] += ", Maria!"
    assert own_words(prompts)[3] == {"3", "maria"}
    assert own_words(prompts)[4] == {"4"}
    assert own_words([prompts[4]] * 3) == [{"order", "4", "the", "kettle", "is", "late"}] * 3  # one prompt, three times


def test_the_intervals_are_paired() -> None:
    """A gain that is the same on every prompt is certain, however much the prompts differ."""
    sft = answers_with([0.1, 0.5, 0.9, 0.3], [0.0] * 4, [0.0] * 4)
    policy = sft._replace(gold=sft.gold + 0.05)
    figures = summarize({"base": sft, "sft": sft, "policy": policy}, seed=1, times=100)["gold"]
    assert figures["gain_low"] == pytest.approx(0.05, abs=1e-6)
    assert figures["gain_high"] == pytest.approx(0.05, abs=1e-6)
    assert figures["sft_high"] - figures["sft_low"] > 0.1


def answer_to(row: int, response: str, length: int, base_logprob: float, *, ended: bool = True) -> Answer:
    return Answer(
        id=PROMPTS[row].id,
        prompt=PROMPTS[row].prompt,
        response=response,
        length=length,
        ended=ended,
        score=0.5,
        base_logprob=base_logprob,
        kl=None,
    )


def test_judge_adds_the_gold_score() -> None:
    texts = [f"Dear {TICKETS[0].customer}, sorry.", "no"]
    rows = [answer_to(0, texts[0], 5, -12.5), answer_to(1, texts[1], 8, -72.0, ended=False)]
    answers = judge(rows, FACTS)
    expected = [gold_score(*row) for row in zip(texts, TICKETS[:2], [-2.5, -9.0], strict=True)]
    assert answers.gold.tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[0] > expected[1]
    assert set(answers.parts) == set(WEIGHTS)
    # fluency's mark: a line from 0 at -5 to 1 at -2
    assert answers.parts["fluency"].tolist() == pytest.approx([2.5 / 3, 0.0], abs=1e-6)
    assert answers.fluency.tolist() == [-2.5, -9.0]
    assert answers.ended.tolist() == [1.0, 0.0]
    assert answers.length.tolist() == [5.0, 8.0]
    assert answers.kl.isnan().all()


def test_over_optimisation_is_judged_by_the_gold_score() -> None:
    good = f"Dear {TICKETS[0].customer}, sorry."
    way = [
        HeldOutAnswer(
            update=update,
            id=PROMPTS[0].id,
            prompt=single("p"),
            response=text,
            tokens=[1] * 4,
            score=float(update),
            kl=update / 4,
        )
        for update, text in ((0, "no"), (2, good), (4, "no"))
    ]
    several = [answer_to(1, text, 4, -12.0) for text in ("no", "never")]
    curve, turn = over_optimisation(way, [-12.0] * 3, several, FACTS, best_of=2, times=20, seed=1)
    assert [(row["source"], row["point"], row["root_kl"]) for row in curve] == [
        *(("ppo", 0, 0.0), ("ppo", 2, 0.5**0.5), ("ppo", 4, 1.0)),
        *(("best of n", 1, 0.0), ("best of n", 2, pytest.approx((math.log(2) - 0.5) ** 0.5))),
    ]
    assert curve[1]["gold"] == pytest.approx(gold_score(good, TICKETS[0], -3.0), abs=1e-6)
    assert curve[1]["score"] == 2.0
    assert turn["gold_peak_update"] == 2
    assert turn["turned_down"] == 1.0
    assert over_optimisation([], [], several, FACTS, best_of=2, times=20, seed=1)[1] == {}

    without, turn = over_optimisation(way, [-12.0] * 3, several, NO_FACTS, best_of=2, times=20, seed=1)
    assert turn == {}
    assert without == [{key: value for key, value in row.items() if "gold" not in key} for row in curve]
    # no gold for the prompts that PPO was held out on, and for those of the best of n there is
    mixed, turn = over_optimisation(
        way, [-12.0] * 3, several, FACTS | {PROMPTS[0].id: None}, best_of=2, times=20, seed=1
    )
    assert turn == {}
    assert [row.get("gold_gain") for row in mixed] == [None, None, None, *(row["gold_gain"] for row in curve[3:])]


def test_repetition_by_hand() -> None:
    assert repetition("") == repetition("two words") == 0
    assert repetition("each word is another one") == 0
    assert repetition("so sorry so sorry so sorry") == pytest.approx(0.5)  # 4 trigrams, 2 of them twice
    assert repetition("no no no no no no") == pytest.approx(0.75)  # 4 trigrams, all the same


def test_slices_by_hand() -> None:
    rows = {
        row["slice"]: row
        for row in by_slice(FAKE, {"kind": ["late", "lost", "late", "lost"], "x": ["a"] * 4}, seed=1, times=200)
    }
    assert set(rows) == {"kind: late", "kind: lost", "x: a"}
    assert rows["kind: late"]["prompts"] == 2
    assert rows["kind: late"]["gain"] == pytest.approx(0.15)  # 0.4 and -0.1
    assert rows["kind: late"]["gain_low"] == pytest.approx(-0.1)
    assert rows["kind: lost"]["win_rate"] == 0.75  # a tie and a win
    assert rows["x: a"]["gain"] == pytest.approx(0.15)
    assert rows["kind: lost"]["kl"] == 3.0


def test_thirds_by_length() -> None:
    texts = ["w " * count for count in (1, 2, 3, 4, 5, 6)]
    assert length_thirds(texts) == ["short", "short", "middling", "middling", "long", "long"]
    assert set(length_thirds(["one two"] * 4)) == {"short"}


@pytest.mark.parametrize("kind", ["normal", "skewed", "wins"])
def test_intervals_cover_what_they_say(kind: str) -> None:
    """Of 2,000 samples of 128 prompts, 93 to 97 % have the truth within their 95 % interval."""
    generator = torch.Generator().manual_seed(7)
    truth = {"normal": 0.2, "skewed": 1.0, "wins": 0.8}[kind]
    covered = 0
    for seed in range(2000):
        if kind == "normal":
            values = 0.2 + torch.randn(128, generator=generator)
        elif kind == "skewed":
            values = torch.empty(128).exponential_(generator=generator)
        else:
            values = (torch.rand(128, generator=generator) < 0.8).float()
        figures = with_interval("x", values, resamples(128, 500, seed))
        covered += figures["x_low"] <= truth <= figures["x_high"]
    assert 0.93 <= covered / 2000 <= 0.97


def test_side_by_side() -> None:
    row = side_by_side(TEXTS[:4], FAKE)[2]
    assert (row.prompt, row.base, row.policy) == (TEXTS[2], "text 0.1 2", "text 0.9 2")
    assert row.scores == {
        **{"gold.base": 0.3, "gold.sft": 0.7, "gold.policy": 0.6},
        **{"score.base": 0.0, "score.sft": 1.0, "score.policy": 4.0},
    }


# ---- on tiny models ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base, an SFT model and a policy with another top block, and a reward model on the same lowest block."""
    root = tmp_path_factory.mktemp("evaluate")
    base = load_language_model(tiny_model_dir(root / "start", seed=3, texts=TEXTS))
    tokenizer = load_tokenizer(root / "start")
    base.model.embed_tokens.weight.data[2] *= 2.5
    save_model(base, tokenizer, root / "base")
    for seed, name in enumerate(("sft", "policy")):
        model = load_language_model(root / "base")
        generator = torch.Generator().manual_seed(seed)
        for weight in model.model.layers[1].parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        save_model(model, tokenizer, root / name)
    reward = load_scalar_model(tiny_model_dir(root / "other", seed=4, reward=True, texts=TEXTS))
    reward.model.embed_tokens.load_state_dict(base.model.embed_tokens.state_dict())
    reward.model.layers[0].load_state_dict(base.model.layers[0].state_dict())
    save_model(reward, tokenizer, root / "reward")
    return {name: root / name for name in (*MODELS, "reward")}


@pytest.fixture(scope="module")
def panel(folders: dict[str, Path]) -> Panel:
    return Panel(folders, PARAMS.baseline, 8, PARAMS.seed)


@pytest.fixture(scope="module")
def answers(panel: Panel) -> dict[str, list[Answer]]:
    return {name: panel.answer(name, PROMPTS[:6], Mock()) for name in MODELS}


def plain_logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), response]


def test_every_figure_is_that_of_plain_forward_passes(
    folders: dict[str, Path], panel: Panel, answers: dict[str, list[Answer]]
) -> None:
    """The models share a trunk in the panel; here each answer goes through each whole model alone."""
    tokenizer = load_tokenizer(folders["base"])
    models = {name: load_language_model(folders[name]) for name in MODELS}
    reward_model = load_scalar_model(folders["reward"])
    uniforms = uniforms_for(PARAMS.seed, [f"evaluate {row.id}" for row in PROMPTS[:6]], 8)
    for name in MODELS:
        for row, found in enumerate(answers[name]):
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
            assert found.response == tokenizer.decode(response, skip_special_tokens=True).strip()
            logprobs = {other: plain_logprobs(models[other], prompt, response) for other in MODELS}
            assert found.base_logprob == pytest.approx(logprobs["base"].sum().item(), abs=1e-3)
            if name == "policy":
                assert found.kl == pytest.approx((logprobs[name] - logprobs["sft"]).sum().item(), abs=1e-4)
            else:
                assert found.kl is None
            with torch.no_grad():
                score = reward_model(input_ids=torch.tensor([prompt + response])).logits[0, 0] - 0.25
            assert found.score == pytest.approx(score.item(), abs=1e-4)
            assert found.length == len(response)
            assert found.ended == (response[-1] == tokenizer.eos_token_id)
            on_the_way = HeldOutAnswer(
                **found.model_dump(include={"id", "prompt", "response", "score"}), update=1, tokens=response, kl=0.0
            )
            assert panel.base_logprobs([on_the_way], Mock()) == [pytest.approx(found.base_logprob, abs=1e-3)]
    assert max(abs(answer.kl or 0) for answer in answers["policy"]) > 0.1
    assert [row.response for row in answers["sft"]] != [row.response for row in answers["policy"]]


def test_answers_do_not_depend_on_which_other_prompts_there_are(panel: Panel, answers: dict[str, list[Answer]]) -> None:
    for name in MODELS:
        some = panel.answer(name, [PROMPTS[4], PROMPTS[1]], Mock())
        assert [row.response for row in some] == [answers[name][4].response, answers[name][1].response]


def test_every_turn_of_a_conversation_is_seen(panel: Panel) -> None:
    """The same random numbers, for the id is the same: what differs comes of the turns."""
    versions = [CONVERSATION, CONVERSATION[1:], CONVERSATION[:1] + CONVERSATION[3:], CONVERSATION[3:]]
    found = [panel.answer("policy", [Prompt(id="one", prompt=turns)], Mock())[0] for turns in versions]
    assert [row.prompt for row in found] == versions
    assert len({row.score for row in found}) == 4


def run_stages(
    root: Path,
    folders: dict[str, Path],
    params: Params = PARAMS,
    facts: dict[str, Ticket | None] = FACTS,
    prepared_for: Path | None = None,
) -> tuple[dict[str, Any], Mock]:
    """`baseline`, then `evaluate` with what PPO leaves behind; returns the report."""
    for name, folder in folders.items():
        (root / "data/models").mkdir(parents=True, exist_ok=True)
        (root / f"data/models/{name}").symlink_to(folder)
    write_rows(root / "data/prepared/prompts/eval.jsonl", PROMPTS)
    give_fingerprint(prepared_for or folders["base"], root / "data/prepared")
    rows = [PromptFacts(id=id, source="tickets", ticket=ticket) for id, ticket in reversed(facts.items())]
    write_rows(root / "data/prepared/facts.jsonl", rows)
    write_json(root / "data/reports/ppo/metrics.json", {"ppo": {"kept_update": 2}})
    way = [
        HeldOutAnswer(
            update=update,
            id=PROMPTS[row].id,
            prompt=PROMPTS[row].prompt,
            response=f"so {update}",
            tokens=[5, 6],
            score=1.0,
            kl=0.5,
        )
        for update in (0, 2)
        for row in (6, 7)
    ]
    write_rows(root / "data/collected/held_out/answers.jsonl", way)
    tracker = Mock()
    for name, module in {"baseline": baseline.run, "evaluate": run}.items():
        stage = Stage(load_stages()[name], params, tracker, root=root)
        module(stage)
        stage.commit()
    return read_figures((root / "data/reports/evaluation/metrics.json").read_text(encoding="utf-8")), tracker


def test_the_stages_and_their_report(
    folders: dict[str, Path], answers: dict[str, list[Answer]], tmp_path: Path
) -> None:
    report, tracker = run_stages(tmp_path / "one", folders)
    figures = flat(report)
    assert set(figures) >= PROMISED
    turn = report.pop("overoptimisation")
    assert report == summarize({name: judge(rows, FACTS) for name, rows in answers.items()}, PARAMS.seed, 50)
    assert (turn["kept_update"], turn["turned_down"]) == (2, 0.0)
    path = tmp_path / "one/data/reports/evaluation/samples.jsonl"
    rows = read_rows(path, SideBySide)
    assert [row.prompt for row in rows] == TEXTS[:6]
    assert [row.policy for row in rows] == [row.response for row in answers["policy"]]
    logged = [call.args for call in tracker.metrics.call_args_list]
    assert logged[0] == ({f"eval/{name}": value for name, value in figures.items()},)
    headline = {
        **{"gold": "gold.policy", "score": "score.policy"},
        **{"kl": "kl", "win_rate": "win_rate", "score_win_rate": "score_win_rate"},
    }
    assert logged[1] == ({f"all/{name}": figures[key] for name, key in headline.items()},)
    assert [(sorted(values), step) for values, step in logged[2:]] == [
        (["held_out/gold", "held_out/kl", "held_out/score"], step) for step in (0, 2)
    ]
    (_, table), _ = tracker.table.call_args
    assert {"prompt", "base", "sft", "policy", "gold.policy", "score.sft"} <= table[0].keys()
    several = read_rows(tmp_path / "one/data/collected/baseline/sft_several.jsonl", Answer)
    assert [row.id for row in several] == [PROMPTS[0].id] * 4 + [PROMPTS[1].id] * 4
    assert len({row.response for row in several[:4]}) > 1
    curve = (tmp_path / "one/data/reports/evaluation/overoptimisation.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in curve[1:]] == [
        *(["ppo", "0"], ["ppo", "2"], ["best of n", "1"], ["best of n", "2"], ["best of n", "4"]),
    ]

    run_stages(tmp_path / "two", folders)
    for name in ("data/reports/evaluation", "data/collected/baseline"):
        assert hash_path(tmp_path / "two" / name) == hash_path(tmp_path / "one" / name)


def test_the_stages_on_prompts_without_tickets(folders: dict[str, Path], tmp_path: Path) -> None:
    report, tracker = run_stages(tmp_path / "none", folders, facts=NO_FACTS)
    full, _ = run_stages(tmp_path / "all", folders)
    assert report.keys() == full.keys() - {"gold", "win_rate", "win_rate_low", "win_rate_high", "checks", "overrated"}
    assert report["score"] == full["score"]
    assert report["overoptimisation"] == {"kept_update": 2}
    logged = [call.args for call in tracker.metrics.call_args_list]
    assert logged[1] == (
        {
            "all/score": report["score"]["policy"],
            "all/kl": report["kl"],
            "all/score_win_rate": report["score_win_rate"],
        },
    )
    assert sorted(logged[2][0]) == ["held_out/kl", "held_out/score"]
    written = tmp_path / "none/data/reports/evaluation"
    for name in ("metrics.json", "slices.csv", "overoptimisation.csv", "samples.jsonl"):
        assert "nan" not in (written / name).read_text().lower()
    slices = (written / "slices.csv").read_text()
    assert "source: tickets" in slices
    assert "prompt length: " in slices
    assert "kind: " not in slices


def test_an_identical_policy_gains_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    report, _ = run_stages(tmp_path, {**folders, "policy": folders["sft"]})
    figures = flat(report)
    for name in ("gold.gain", "gold.gain_low", "gold.gain_high", "score.gain"):
        assert figures[name] == 0, name
    for name in ("win_rate", "win_rate_low", "win_rate_high", "score_win_rate", "versus.sft.gold.win_rate"):
        assert figures[name] == 0.5, name
    assert figures["versus.sft.gold.tie"] == 1.0
    assert figures["kl"] == pytest.approx(0, abs=1e-5)
    assert figures["fluency.policy"] == figures["fluency.sft"]


def test_more_prompts_than_there_are(folders: dict[str, Path], tmp_path: Path) -> None:
    many = PARAMS.model_copy(update={"baseline": PARAMS.baseline.model_copy(update={"prompts": 9})})
    with pytest.raises(UserError, match=r"baseline\.prompts is 9, and the eval split has 8 prompts"):
        run_stages(tmp_path, folders, many)


def test_models_of_different_tokenizers_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_model_dir(tmp_path / "other")
    with pytest.raises(UserError, match="different tokenizers"):
        run_stages(tmp_path / "repo", {**folders, "policy": other})


def test_prompts_prepared_for_another_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_model_dir(tmp_path / "other")
    with pytest.raises(UserError, match=r"data/prepared: \w+, .*data/models/base: "):
        run_stages(tmp_path / "repo", folders, prepared_for=other)
