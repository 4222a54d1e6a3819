"""The reward model: its loss by hand, its head, its schedule, and the stage on a tiny model; a run that is killed goes
on and ends with the same bits."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from tasks.checkpoints import Checkpoints
from tasks.conversations import single
from tasks.datasets import Demonstration, Ranking, read_figures, write_json, write_rows
from tasks.lineage import load_stages
from tasks.models import centred_scores, encode_prompt, encode_response, load_scalar_model, load_tokenizer, pack
from tasks.params import load_params
from tasks.reward import (
    init_head,
    kwise_loss,
    measure,
    pack_ranking,
    pair_accuracy,
    run,
    shuffled_batches,
    tied_pairs,
    train,
    warmup_cosine,
)
from tasks.reward_report import PROBES
from tasks.stage import Stage, UserError
from tasks.tracking import Tracker
from tests.killing import kill_and_finish, written_by
from tests.tiny import CONVERSATION, IN_CHATML, give_fingerprint, tiny_model_dir

DEFAULTS = load_params(Path("params.yaml"))
REWARD = DEFAULTS.reward.model_copy(
    update={"trainable_layers": 1, "epochs": 3, "batch_prompts": 4, "learning_rate": 1e-2, "centre_on": 6}
)
PARAMS = DEFAULTS.model_copy(update={"reward": REWARD})


def ranking(number: int, *, held_out: bool = False) -> Ranking:
    """A problem that can be learned: the more often a reply says sorry, the better; of equal ones neither is."""
    wishes = ["order", "refund", "ticket", "monday"][number % 4]
    sorry = [(number * 7 + k * 3) % 4 for k in range(3)]
    return Ranking(
        id=f"p{number}",
        prompt=single(f"hello your {wishes} {number}"),
        responses=[f"dear {wishes} " + "sorry " * times + "by monday" for times in sorry],
        ended=[True, True, number % 5 > 0],
        ranks=[1 + sum(other > times for other in sorry) for times in sorry],
        labeler="ada",
        held_out=held_out,
    )


def all_tied(number: int) -> Ranking:
    return ranking(number).model_copy(update={"ranks": [1, 1, 1]})


DEMONSTRATIONS = [
    Demonstration(id=f"d{n}", prompt=single(f"hello ticket {n}"), response=f"we are sorry {'will ' * n}", labeler="ada")
    for n in range(8)
]


def loss_by_pairs(scores: Tensor, ranks: list[int]) -> float:
    """InstructGPT, equation 1, written out."""
    losses = []
    for a, b in combinations(range(len(ranks)), 2):
        if ranks[a] != ranks[b]:
            better, worse = (a, b) if ranks[a] < ranks[b] else (b, a)
            losses.append(-math.log(1 / (1 + math.exp(scores[worse].item() - scores[better].item()))))
    return sum(losses) / len(losses)


# ---- loss ----


def test_kwise_loss_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0], dtype=torch.double)
    # best is the second, then the first, then the third: differences 3 - 1 = 2, 3 - 2 = 1, 1 - 2 = -1
    # log(1 + e^-2) = 0.1269280, log(1 + e^-1) = 0.3132617, log(1 + e) = 1.3132617; their mean
    assert kwise_loss(scores, torch.tensor([2, 1, 3])).item() == pytest.approx(0.5844838, abs=1e-7)


def test_kwise_loss_with_a_tie_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0], dtype=torch.double)
    # the first and the third are tied: (0.1269280 + 0.3132617) / 2
    assert kwise_loss(scores, torch.tensor([2, 1, 2])).item() == pytest.approx(0.2200948, abs=1e-7)


def test_kwise_loss_is_that_of_a_loop_over_the_pairs() -> None:
    torch.manual_seed(0)
    for ranks in ([1, 2, 3, 4], [3, 1, 1, 2], [2, 2, 1, 2], [4, 3, 1, 2], [1, 2]):
        scores = 2 * torch.randn(len(ranks), dtype=torch.double)
        assert kwise_loss(scores, torch.tensor(ranks)).item() == pytest.approx(loss_by_pairs(scores, ranks), abs=1e-12)


def test_kwise_loss_pulls_apart_what_is_ordered_and_leaves_what_is_tied() -> None:
    scores = torch.zeros(3, requires_grad=True)
    kwise_loss(scores, torch.tensor([2, 1, 2])).backward()
    assert scores.grad is not None
    # each of two pairs has weight 1/2 and slope sigmoid(0) = 1/2
    assert scores.grad.tolist() == pytest.approx([0.25, -0.5, 0.25], abs=1e-7)


def test_pair_accuracy_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 0.0])
    # pairs, better first: (2nd, 1st) right, (1st, 3rd) equal, (1st, 4th) right, (2nd, 3rd) right, (2nd, 4th) right,
    # and (4th, 3rd) wrong
    accuracy = pair_accuracy(scores, torch.tensor([2, 1, 4, 3]))
    assert sorted(accuracy.tolist()) == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert pair_accuracy(scores, torch.tensor([1, 1, 1, 2])).tolist() == [1.0, 1.0, 1.0]


def test_tied_pairs_by_hand() -> None:
    row = ranking(0)
    for ranks, ties in (([1, 2, 3], 0), ([1, 1, 2], 1), ([1, 1, 1], 3), ([1, 1, 1, 2, 2], 4)):
        assert tied_pairs(row.model_copy(update={"ranks": ranks})) == ties


# ---- training ----


def test_init_head_is_as_in_stiennon() -> None:
    model = Mock()
    model.score = torch.nn.Linear(9999, 1, bias=False)
    init_head(model, 1)
    weight = model.score.weight.detach().clone()
    # standard deviation 1 / sqrt(9999 + 1) = 0.01; of an estimate from 9999 numbers the error is 0.7 %
    assert weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert weight.mean().item() == pytest.approx(0, abs=4e-4)
    init_head(model, 1)
    assert torch.equal(weight, model.score.weight)
    init_head(model, 2)
    assert not torch.equal(weight, model.score.weight)


def test_warmup_cosine_by_hand() -> None:
    # two steps up, then half a cosine over eight
    shares = [warmup_cosine(step, 10, 2) for step in range(11)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[4] == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert shares[6] == pytest.approx(0.5)
    assert shares[10] == pytest.approx(0.0, abs=1e-12)
    assert warmup_cosine(0, 10, 0) == 1.0
    assert warmup_cosine(3, 3, 3) == 1.0


def test_a_batch_holds_each_row_once_an_epoch() -> None:
    batches = shuffled_batches(10, 4, 3, seed=1)
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [[*first, *second, *third] for first, second, third in (batches[:3], batches[3:6], batches[6:])]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert shuffled_batches(10, 4, 3, seed=1) == batches != shuffled_batches(10, 4, 3, seed=2)


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("reward") / "sft", seed=5)


@pytest.mark.parametrize("trainable_layers", [1, "all"])
def test_training_learns_what_can_be_learned(sft: Path, tmp_path: Path, trainable_layers: Any) -> None:
    model, tokenizer = load_scalar_model(sft), load_tokenizer(sft)
    init_head(model, 1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rankings = [ranking(number) for number in range(24)]
    params = REWARD.model_copy(update={"epochs": 8, "trainable_layers": trainable_layers})
    tracker = Mock()
    model.config.score_bias = 0.0
    fresh = [ranking(number) for number in range(100, 120)]
    start, _ = measure(model, tokenizer, fresh, 1)
    history = train(model, tokenizer, rankings, params, 1, tracker, Checkpoints(tmp_path, fingerprint="test"))
    end, _ = measure(model, tokenizer, fresh, 1)
    assert [row["step"] for row in history] == list(range(1, 49))
    assert tracker.metrics.call_count == 48
    assert history[-1]["accuracy"] == 1 > history[0]["accuracy"]
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]
    assert start["accuracy"] < 0.7
    assert end["accuracy"] > 0.9
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    expected = {
        name
        for name in before
        if trainable_layers == "all" or name.startswith(("model.layers.1.", "model.norm.", "score."))
    }
    assert changed == expected


def test_the_loss_of_a_batch_is_the_mean_over_its_prompts(sft: Path, tmp_path: Path) -> None:
    """The first step's loss, before anything moved, from scores of the whole model one response at a time."""
    model, tokenizer = load_scalar_model(sft), load_tokenizer(sft)
    init_head(model, 1)
    rankings = [ranking(number) for number in range(4)]
    expected = []
    for row in rankings:
        prompt = encode_prompt(tokenizer, row.prompt)
        scores = [
            model(input_ids=torch.tensor([prompt + encode_response(tokenizer, text, ended=ended)])).logits[0, 0]
            for text, ended in zip(row.responses, row.ended, strict=True)
        ]
        expected.append(loss_by_pairs(torch.stack(scores).detach(), row.ranks))
    history = train(model, tokenizer, rankings, REWARD, 1, Mock(), Checkpoints(tmp_path, fingerprint="test"))
    assert history[0]["loss"] == pytest.approx(sum(expected) / 4, abs=1e-5)


# ---- stage ----

RANKINGS = [ranking(number, held_out=number >= 20) for number in range(28)] + [all_tied(28), all_tied(29)]


def lay_out(root: Path, sft: Path, rankings: list[Ranking] = RANKINGS, apart: Sequence[Ranking] = ()) -> Path:
    """The stage's inputs. apart: of held-out labelers."""
    write_rows(root / "data/collected/rankings/rankings.jsonl", rankings)
    write_rows(root / "data/collected/rankings/held_out_labelers.jsonl", apart)
    write_rows(root / "data/collected/demonstrations/demonstrations.jsonl", DEMONSTRATIONS)
    write_json(root / "data/reports/rank/metrics.json", {"rank": {"noise_ceiling": 0.9}})
    (root / "data/models").mkdir(parents=True)
    (root / "data/models/sft").symlink_to(sft)
    give_fingerprint(sft, root / "data/collected/demonstrations")
    return root


def run_stage(root: Path, tracker: Any = None, **changes: Any) -> None:
    params = PARAMS.model_copy(update={"reward": REWARD.model_copy(update=changes)})
    stage = Stage(load_stages()["reward"], params, tracker or Mock(), root=root)
    run(stage)
    stage.commit()


@pytest.fixture(scope="module")
def stage_root(sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reward") / "repo"
    run_stage(lay_out(root, sft))
    return root


def test_the_mean_demonstration_scores_zero(stage_root: Path) -> None:
    folder = stage_root / "data/models/reward"
    model, tokenizer = load_scalar_model(folder), load_tokenizer(folder)
    packs = [
        pack(encode_prompt(tokenizer, row.prompt), [encode_response(tokenizer, row.response)]) for row in DEMONSTRATIONS
    ]
    # reward.centre_on is 6
    scores = torch.cat(centred_scores(model, packs[:6], 4))
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std() > 1e-3
    assert abs(model.config.score_bias) > 1e-3


def test_the_report(stage_root: Path) -> None:
    report = read_figures((stage_root / "data/reports/reward/metrics.json").read_text(encoding="utf-8"))["reward"]
    assert set(report) == {
        *("accuracy", "accuracy_low", "accuracy_high", "loss", "held_out_prompts", "held_out_pairs"),
        *(
            "noise_ceiling",
            "train_accuracy",
            "score_bias",
            "train_prompts",
            "all_tied_prompts",
            "tied_pairs",
            "calibration_error",
            "held_out_labelers_accuracy",
            "held_out_labelers_pairs",
        ),
    }
    assert (report["held_out_labelers_accuracy"], report["held_out_labelers_pairs"]) == (None, 0)
    assert report["train_prompts"] == 20
    assert report["held_out_prompts"] == 8
    held_out = RANKINGS[20:28]
    assert report["held_out_pairs"] == sum(3 - tied_pairs(row) for row in held_out)
    assert report["all_tied_prompts"] == 2
    assert report["tied_pairs"] == sum(tied_pairs(row) for row in RANKINGS)
    assert report["noise_ceiling"] == 0.9
    assert report["accuracy_low"] <= report["accuracy"] <= report["accuracy_high"]
    assert report["accuracy"] > 0.6
    tables = {
        name: (stage_root / f"data/reports/reward/{name}.csv").read_text().splitlines()[1:]
        for name in ("slices", "reliability", "probes", "scores")
    }
    assert sum(int(line.split(",")[0]) for line in tables["reliability"]) == report["held_out_pairs"]
    assert {line.partition(":")[0] for line in tables["slices"]} == {
        *("rank distance", "labeler", "prompt length", "the better one is"),
    }
    assert [line.partition(",")[0] for line in tables["probes"]] == list(PROBES)
    sources = [line.partition(",")[0] for line in tables["scores"]]
    assert (sources.count("demonstrations"), sources.count("samples")) == (6, 24)
    # three epochs of five steps; train_accuracy is of the last
    lines = (stage_root / "data/reports/reward/history.csv").read_text().splitlines()
    assert len(lines) == 16
    last = [float(line.split(",")[2]) for line in lines[-5:]]
    assert report["train_accuracy"] == pytest.approx(sum(last) / 5)


def test_the_held_out_accuracy_by_hand(stage_root: Path) -> None:
    """From the loaded model's scores, one response at a time, counted pair by pair."""
    folder = stage_root / "data/models/reward"
    model, tokenizer = load_scalar_model(folder), load_tokenizer(folder)
    right, losses = [], []
    for row in RANKINGS[20:28]:
        prompt = encode_prompt(tokenizer, row.prompt)
        scores = [
            model(input_ids=torch.tensor([prompt + encode_response(tokenizer, text, ended=ended)])).logits[0, 0].item()
            for text, ended in zip(row.responses, row.ended, strict=True)
        ]
        losses.append(loss_by_pairs(torch.tensor(scores), row.ranks))
        for a, b in combinations(range(3), 2):
            if row.ranks[a] != row.ranks[b]:
                right.append((scores[a] > scores[b]) == (row.ranks[a] < row.ranks[b]))
    report = read_figures((stage_root / "data/reports/reward/metrics.json").read_text(encoding="utf-8"))["reward"]
    assert report["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert report["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_the_same_bits_twice(stage_root: Path, sft: Path, tmp_path: Path) -> None:
    run_stage(lay_out(tmp_path, sft))
    outs = [path.relative_to(stage_root) for path in sorted(stage_root.glob("data/models/reward/*"))]
    assert any(path.suffix == ".safetensors" for path in outs)
    for path in (*outs, Path("data/reports/reward/metrics.json"), Path("data/reports/reward/history.csv")):
        assert (tmp_path / path).read_bytes() == (stage_root / path).read_bytes(), path


@pytest.mark.parametrize(
    ("rankings", "counts"),
    [
        (RANKINGS[:20], "20 rankings to train on and 0 held out"),
        (RANKINGS[20:28], "0 rankings to train on and 8 held out"),
        (RANKINGS[28:], "0 rankings to train on and 0 held out"),
    ],
)
def test_both_sides_must_have_an_order(sft: Path, tmp_path: Path, rankings: list[Ranking], counts: str) -> None:
    with pytest.raises(UserError, match=rf"{counts} have an order; .*\n?.*rank\.held_out_share"):
        run_stage(lay_out(tmp_path, sft, rankings))
    assert not (tmp_path / "data/models/reward").exists()


def test_votes_between_two_answers_train_and_are_measured_beside_rankings(sft: Path, tmp_path: Path) -> None:
    """Two responses beside three, a second ranking of a prompt, a tie of all; on both sides."""
    votes = [
        ranking(number, held_out=number >= 20).model_copy(
            update={"responses": ["dear sorry", "dear"], "ended": [True, False], "ranks": ranks, "labeler": "Ann, 2"}
        )
        for number in (0, 1, 20, 21)
        for ranks in ([1, 2], [1, 1])
    ]
    run_stage(lay_out(tmp_path, sft, RANKINGS + votes))
    report = read_figures((tmp_path / "data/reports/reward/metrics.json").read_text(encoding="utf-8"))["reward"]
    assert (report["train_prompts"], report["held_out_prompts"], report["all_tied_prompts"]) == (20, 8, 6)
    assert report["held_out_pairs"] == sum(3 - tied_pairs(row) for row in RANKINGS[20:28]) + 2
    assert report["tied_pairs"] == sum(tied_pairs(row) for row in RANKINGS) + 4
    assert math.isfinite(report["loss"])
    with (tmp_path / "data/reports/reward/slices.csv").open(newline="") as file:
        pairs = {row["slice"]: int(row["pairs"]) for row in csv.DictReader(file)}
    assert pairs["labeler: Ann, 2"] == 2


def test_rankings_as_people_bring_them(sft: Path, tmp_path: Path) -> None:
    """Conversations, two to five responses, one row twice, several rankings of a prompt, and no noise ceiling."""

    def brought(number: int, count: int, labeler: str, *, held_out: bool) -> Ranking:
        prompt = [*CONVERSATION[:3], *single(f"and order {number}?")]
        responses = ["sorry " * times for times in range(count)]
        ranks = [count - times for times in range(count)]
        return Ranking(
            id=f"p{number}",
            prompt=prompt,
            responses=responses,
            ended=[True] * count,
            ranks=ranks,
            labeler=labeler,
            held_out=held_out,
        )

    rows = [brought(number, 2 + number % 4, "ann", held_out=number >= 8) for number in range(12)]
    rows += [rows[0], rows[0], brought(8, 3, "bo", held_out=True)]
    root = lay_out(tmp_path, sft, rows)
    write_json(root / "data/reports/rank/metrics.json", {"rank": {"noise_ceiling": None}})
    events: list[dict[str, Any]] = []
    run_stage(root, Tracker.in_memory(events))
    report = read_figures((root / "data/reports/reward/metrics.json").read_text(encoding="utf-8"))["reward"]
    assert (report["train_prompts"], report["held_out_prompts"]) == (8, 4)
    # pairs of 2, 3, 4 and 5 responses, and of bo's 3
    assert report["held_out_pairs"] == 1 + 3 + 6 + 10 + 3
    assert report["noise_ceiling"] is None
    logged = {name for event in events if event["kind"] == "metrics" for name in event["values"]}
    assert "reward/accuracy" in logged
    assert "reward/noise_ceiling" not in logged
    with (root / "data/reports/reward/slices.csv").open(newline="") as file:
        prompts = {row["slice"]: int(row["prompts"]) for row in csv.DictReader(file)}
    assert (prompts["labeler: ann"], prompts["labeler: bo"]) == (4, 1)


def test_held_out_labelers_are_not_trained_on_and_measured_apart(stage_root: Path, sft: Path, tmp_path: Path) -> None:
    """Zoe ranked four prompts that others were not trained on and two that they were; Yan one that nobody else did."""

    def of(labeler: str, number: int) -> Ranking:
        row = ranking(number)
        return row.model_copy(update={"labeler": labeler, "ranks": [4 - rank for rank in row.ranks]})

    apart = [of("zoe", number) for number in (20, 21, 22, 23, 0, 1)] + [of("yan", 40), all_tied(41)]
    root = lay_out(tmp_path, sft, apart=apart)
    run_stage(root)
    assert (root / "data/models/reward/model.safetensors").read_bytes() == (
        stage_root / "data/models/reward/model.safetensors"
    ).read_bytes(), "the same model as without them"
    reports = [folder / "data/reports/reward/metrics.json" for folder in (root, stage_root)]
    report, before = (read_figures(file.read_text(encoding="utf-8"))["reward"] for file in reports)
    theirs = {name for name in report if name.startswith("held_out_labelers")}
    assert {name: value for name, value in report.items() if name not in theirs} == {
        name: value for name, value in before.items() if name not in theirs
    }, "the accuracy that gates read is of the others"

    with (root / "data/reports/reward/slices.csv").open(newline="") as file:
        slices = {row["slice"]: row for row in csv.DictReader(file) if row["slice"].startswith("held-out labeler")}
    pairs = {name: int(row["pairs"]) for name, row in slices.items()}
    of_zoe = sum(3 - tied_pairs(ranking(number)) for number in (20, 21, 22, 23))
    of_yan = 3 - tied_pairs(ranking(40))
    assert pairs == {
        "held-out labelers: prompts not trained on": of_zoe + of_yan,
        "held-out labelers: prompts trained on": sum(3 - tied_pairs(ranking(number)) for number in (0, 1)),
        "held-out labeler: yan": of_yan,
        "held-out labeler: zoe": of_zoe,
    }
    assert report["held_out_labelers_pairs"] == of_zoe + of_yan
    fresh = slices["held-out labelers: prompts not trained on"]
    for end in ("", "_low", "_high"):
        assert report[f"held_out_labelers_accuracy{end}"] == float(fresh[f"accuracy{end}"])
    assert report["held_out_labelers_accuracy"] < 0.5, "they like what the others do not"


def test_held_out_labelers_of_prompts_that_were_all_trained_on_have_no_figure(sft: Path, tmp_path: Path) -> None:
    root = lay_out(tmp_path, sft, apart=[ranking(0).model_copy(update={"labeler": "zoe"})])
    run_stage(root)
    report = read_figures((root / "data/reports/reward/metrics.json").read_text(encoding="utf-8"))["reward"]
    assert (report["held_out_labelers_accuracy"], report["held_out_labelers_pairs"]) == (None, 0)


def test_a_conversation_is_scored_whole(sft: Path) -> None:
    tokenizer = load_tokenizer(sft)
    packed = pack_ranking(tokenizer, ranking(1).model_copy(update={"prompt": CONVERSATION}))
    prompt = packed.inputs[packed.blocks == 0].tolist()
    assert prompt == tokenizer(IN_CHATML, add_special_tokens=False).input_ids


# ---- resuming ----


class Stopped(Exception):
    pass


def stopping_tracker(step: int) -> Mock:
    """Takes metrics up to a step, and there ends the run."""

    def take(_: dict[str, float], at: int) -> None:
        if at >= step:
            raise Stopped

    return Mock(metrics=Mock(side_effect=take))


@pytest.mark.parametrize("trainable_layers", [1, "all"])
def test_a_run_that_was_stopped_goes_on_from_its_last_checkpoint(
    sft: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], trainable_layers: Any
) -> None:
    through, tracker = Mock(), Mock()
    whole, stopped = lay_out(tmp_path / "whole", sft), lay_out(tmp_path / "stopped", sft)
    changes = {"trainable_layers": trainable_layers, "checkpoint_every": 4}  # of 15 steps, 5 an epoch
    run_stage(whole, through, **changes)
    with pytest.raises(Stopped):
        run_stage(stopped, stopping_tracker(11), **changes)
    capfd.readouterr()
    run_stage(stopped, tracker, **changes)
    assert "reward: resuming at step 8 of 15 (checkpoint written" in capfd.readouterr().err
    assert tracker.metrics.call_args_list == through.metrics.call_args_list, "the new run's curves are complete"
    assert written_by(stopped, "reward") == written_by(whole, "reward")


def run_killed_stage(root: Path) -> None:
    run_stage(root, checkpoint_every=2)


def test_killed_at_any_moment_it_ends_with_the_same_bits(sft: Path, tmp_path: Path) -> None:
    kill_and_finish(run_killed_stage, lambda name: lay_out(tmp_path / name, sft), "reward", saves=7, seed=2)
