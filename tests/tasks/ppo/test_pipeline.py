"""The stage `ppo` on tiny models."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tasks.conversations import Conversation, single, text_of
from tasks.datasets import Demonstration, HeldOutAnswer, Prompt, prompt_id, read_figures, read_rows, write_rows
from tasks.lineage import load_stages
from tasks.models import load_language_model, load_scalar_model, load_tokenizer, save_model, shared_depth
from tasks.params import load_params
from tasks.ppo import run
from tasks.ppo.trainer import PPOTrainer
from tasks.stage import Stage, UserError
from tests.tiny import CONVERSATION, give_fingerprint, tiny_model_dir

DEFAULTS = load_params(Path("params.yaml"))
PPO = replace(
    DEFAULTS.ppo,
    trainable_layers=1,
    updates=2,
    batch_size=8,
    samples_per_prompt=2,
    minibatch_size=4,
    micro_batch_size=2,
    learning_rate=3e-3,
    eval_every=1,
    eval_prompts=2,
    sample_every=1,
    checkpoint_every=1,
    kl_limit=None,
)
TEXTS = ["hello dear", "your order is late", "refund it", "sorry", "by monday", "ticket 7"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return stage_models(tmp_path_factory.mktemp("ppo"))


def stage_models(root: Path) -> dict[str, Path]:
    """The models that the stage reads."""
    sft = load_language_model(tiny_model_dir(root / "sft", seed=3))
    reward = load_scalar_model(tiny_model_dir(root / "other", reward=True, seed=4))
    reward.model.embed_tokens.load_state_dict(sft.model.embed_tokens.state_dict())
    reward.model.layers[0].load_state_dict(sft.model.layers[0].state_dict())
    save_model(reward, load_tokenizer(root / "sft"), root / "reward")
    return {"sft": root / "sft", "reward": root / "reward"}


def run_stage(
    root: Path,
    folders: dict[str, Path],
    deps: tuple[str, ...] = (),
    conversations: Sequence[Conversation] = tuple(map(single, TEXTS)),
    prepared_for: Path | None = None,
    **changes: Any,
) -> Mock:
    """prepared_for: the model whose tokenizer the data were prepared with, where it is another."""
    write_rows(
        root / "data/prepared/prompts/ppo.jsonl",
        [Prompt(id=prompt_id(one), prompt=one) for one in conversations],
    )
    demonstrations = [
        Demonstration(id=prompt_id(one), prompt=one, response="we are sorry", labeler="ada") for one in conversations
    ]
    write_rows(root / "data/collected/demonstrations/demonstrations.jsonl", demonstrations)
    (root / "data/models").mkdir(parents=True, exist_ok=True)
    for name, folder in folders.items():
        if not (root / f"data/models/{name}").exists():
            (root / f"data/models/{name}").symlink_to(folder)
    give_fingerprint(folders["sft"], root / "data/prepared", root / "data/collected/demonstrations")
    if prepared_for:
        give_fingerprint(prepared_for, root / "data/prepared")
    params = DEFAULTS.model_copy(
        update={
            "ppo": replace(PPO, **changes),
            "text": DEFAULTS.text.model_copy(update={"max_response_tokens": 6}),
        }
    )
    tracker = Mock()
    spec = load_stages()["ppo"]
    # of the code, what is not in this folder changes nothing here
    data = tuple(dep for dep in spec.deps if dep.startswith("data/"))
    stage = Stage(replace(spec, deps=data + deps), params, tracker, root=root)
    run(stage)
    stage.commit()
    return tracker


def test_the_stage_and_its_report(folders: dict[str, Path], tmp_path: Path) -> None:
    tracker = run_stage(tmp_path / "one", folders, eval_every=0)
    models = tmp_path / "one/data/models"
    sft, policy = load_language_model(folders["sft"]), load_language_model(models / "policy")
    assert shared_depth(sft, policy, 2) == 1
    assert not torch.equal(policy.model.layers[1].mlp.up_proj.weight, sft.model.layers[1].mlp.up_proj.weight)
    reward, value = load_scalar_model(folders["reward"]), load_scalar_model(models / "value")
    assert shared_depth(reward, value, 2) == 1
    assert not torch.equal(value.score.weight, reward.score.weight)
    assert value.config.score_bias == reward.config.score_bias == 0.25

    reports = tmp_path / "one/data/reports/ppo"
    with (reports / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [row["update"] for row in history] == ["1", "2"]
    report = read_figures((reports / "metrics.json").read_text(encoding="utf-8"))["ppo"]
    assert report["updates"] == 2
    assert {"score", "kl", "approx_kl", "clip_fraction", "policy_loss", "value_loss"} <= set(report)
    assert report["score"] == report["kept_score"] == float(history[-1]["score"])
    logged = [call.args for call in tracker.metrics.call_args_list if "ppo/score" in call.args[0]]
    assert [step for _, step in logged] == [1, 2]
    assert logged[1][0]["ppo/kl"] == report["kl"]
    assert (report["kept_update"], report["stopped_early"]) == (2, 0)
    name, rows = tracker.table.call_args.args
    assert name == "ppo_samples"
    assert [row["update"] for row in rows] == [1] * 8 + [2] * 8
    assert {row["prompt"] for row in rows} <= set(TEXTS)
    assert not any(name.startswith("time/") for row in history for name in row)
    assert not list((tmp_path / "one/.rlhf").rglob("step-*")), "the result is in place"

    run_stage(tmp_path / "two", folders, eval_every=0)
    same_files(tmp_path / "one", tmp_path / "two")


def same_files(one: Path, other: Path) -> None:
    files = [
        path.relative_to(one) for path in (*one.glob("data/models/[pv]*/*"), *(one / "data/reports/ppo").iterdir())
    ]
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        assert (one / path).read_bytes() == (other / path).read_bytes(), path


def first_samples(tracker: Mock) -> list[dict[str, Any]]:
    return [row for row in tracker.table.call_args.args[1] if row["update"] == 1]


def test_the_best_policy_on_held_out_prompts_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    tracker = run_stage(tmp_path, folders)
    with (tmp_path / "data/reports/ppo/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    report = read_figures((tmp_path / "data/reports/ppo/metrics.json").read_text(encoding="utf-8"))["ppo"]
    evaluated = [report["held_out_start"], *(float(row["held_out_score"]) for row in rows)]
    assert report["held_out_best"] == max(evaluated) == evaluated[report["kept_update"]]
    sft, policy = load_language_model(folders["sft"]), load_language_model(tmp_path / "data/models/policy")
    assert (shared_depth(sft, policy, 2) == 2) == (report["kept_update"] == 0)
    assert report["kept_score"] == evaluated[report["kept_update"]]
    assert ("score" in report) == (report["kept_update"] == 2), "no figure of weights that are not kept"
    assert {"ppo/kept_update": report["kept_update"], "ppo/kept_score": report["kept_score"]}.items() <= (
        next(call.args[0] for call in tracker.metrics.call_args_list if "ppo/kept_score" in call.args[0]).items()
    )


def test_more_layers_than_there_are(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trainable_layers is 3, and the model has 2 layers"):
        run_stage(tmp_path, folders, trainable_layers=3)


def test_it_goes_on_from_its_checkpoint(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in its third update, it ends with the files of a run that was never stopped, and the whole curve."""
    run_stage(tmp_path / "whole", folders, updates=3)
    train, seen = PPOTrainer.train_minibatch, []

    def stop_in_the_third(trainer: PPOTrainer, *arguments: Any) -> dict[str, float]:
        seen.append(trainer.update)
        if trainer.update == 2 and seen.count(2) == 2:
            raise KeyboardInterrupt
        return train(trainer, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(PPOTrainer, "train_minibatch", stop_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path / "stopped", folders, updates=3)
    assert [path.name for path in (tmp_path / "stopped").glob(".rlhf/checkpoints/ppo/*/step-*")]
    capsys.readouterr()
    tracker = run_stage(tmp_path / "stopped", folders, updates=3)
    assert "ppo: resuming at update 2 of 3" in capsys.readouterr().err
    logged = [call.args[1] for call in tracker.metrics.call_args_list if "ppo/score" in call.args[0]]
    assert logged == [1, 2, 3]
    assert len(tracker.table.call_args.args[1]) == 24
    same_files(tmp_path / "whole", tmp_path / "stopped")


def test_another_parameter_does_not_resume(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("tasks.ppo.pipeline.save_model", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path, folders)
    run_stage(tmp_path, folders, kl_coef=0.03)
    assert "resuming" not in capsys.readouterr().err


def test_a_value_head_is_saved_as_a_model_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    run_stage(tmp_path, folders, value="head", eval_every=0)
    policy, value = (
        load(tmp_path / f"data/models/{name}")
        for name, load in (("policy", load_language_model), ("value", load_scalar_model))
    )
    assert shared_depth(policy, value, 2) == 2
    assert value.score.weight.abs().sum() > 0
    assert value.config.score_bias == 0


def test_an_early_stop_is_said_and_marked(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = run_stage(tmp_path, folders, updates=5, entropy_floor=100.0)
    report = read_figures((tmp_path / "data/reports/ppo/metrics.json").read_text(encoding="utf-8"))["ppo"]
    assert (report["stopped_early"], report["updates"], report["kept_update"]) == (1, 0, 0)
    out = capsys.readouterr()
    assert "ppo: stopped early: entropy" in out.out + out.err
    assert "below entropy_floor 100" in tracker.tags.call_args.args[0]["ppo.stopped"]
    sft, policy = load_language_model(folders["sft"]), load_language_model(tmp_path / "data/models/policy")
    assert shared_depth(sft, policy, 2) == 2, "no update was made"


REWARDS = """
def short(prompts, responses):
    assert all(isinstance(text, str) for text in prompts + responses)
    return [-len(text) for text in responses]
"""


def test_a_mix_of_the_reward_model_and_a_function(folders: dict[str, Path], tmp_path: Path) -> None:
    alone, mixed = tmp_path / "alone", tmp_path / "mixed"
    (tmp_path / "tasks").mkdir()
    rewards = tmp_path / "rewards.py"
    rewards.write_text(REWARDS)
    of_model = first_samples(run_stage(alone, folders))
    of_mix = first_samples(
        run_stage(mixed, folders, deps=(str(rewards),), rewards={"model": 0.5, f"{rewards}:short": 0.1})
    )
    assert [row["response"] for row in of_mix] == [row["response"] for row in of_model]
    for one, both in zip(of_model, of_mix, strict=True):
        assert both["score"] == pytest.approx(0.5 * one["score"] - 0.1 * len(one["response"]), abs=2e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model2", "is neither `model` nor `FILE.py:FUNCTION`"),
        ("nowhere.py:short", "there is no file nowhere.py here"),
        ("{file}:long", "has no function `long`"),
        ("{broken}:short", "cannot be imported: SyntaxError"),
        ("{undeclared}:short", "to the deps of the stage `ppo` in dvc.yaml"),
    ],
)
def test_rewards_that_cannot_be_had(folders: dict[str, Path], tmp_path: Path, name: str, message: str) -> None:
    files = {part: tmp_path / f"{part}.py" for part in ("file", "broken", "undeclared")}
    for part, file in files.items():
        file.write_text("def (" if part == "broken" else REWARDS)
    declared = (str(files["file"]), str(files["broken"]))
    with pytest.raises(UserError, match=re.escape(message)):
        run_stage(tmp_path / "repo", folders, deps=declared, rewards={name.format(**files): 1.0})


def test_ptx_learns_the_demonstrations(folders: dict[str, Path], tmp_path: Path) -> None:
    def loss(folder: Path) -> float:
        with (folder / "data/reports/ppo/history.csv").open() as file:
            return float(list(csv.DictReader(file))[-1]["ptx_loss"])

    run_stage(tmp_path / "weak", folders, ptx_coef=1e-6, ptx_examples_per_episode=2, eval_every=0)
    run_stage(tmp_path / "strong", folders, ptx_coef=27.8, ptx_examples_per_episode=2, eval_every=0)
    assert loss(tmp_path / "strong") < 0.9 * loss(tmp_path / "weak")


def test_a_reward_model_with_another_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_model_dir(tmp_path / "other", reward=True, texts=["quite another text"])
    with pytest.raises(UserError, match="different tokenizers"):
        run_stage(tmp_path / "repo", {**folders, "reward": other})


def test_prompts_prepared_for_another_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_model_dir(tmp_path / "other", texts=["quite another text"])
    with pytest.raises(UserError, match=r"data/prepared: \w+, .*data/models/sft: "):
        run_stage(tmp_path / "repo", folders, prepared_for=other)


def test_conversations(folders: dict[str, Path], tmp_path: Path) -> None:
    given = [[*CONVERSATION[:3], *single(text)] for text in TEXTS]
    tracker = run_stage(tmp_path, folders, conversations=given, ptx_coef=1.0)
    rows = read_rows(tmp_path / "data/collected/held_out/answers.jsonl", HeldOutAnswer)
    assert len(rows) == 3 * 2
    assert all(row.prompt in given and prompt_id(row.prompt) == row.id for row in rows)
    shown = {row["prompt"] for row in first_samples(tracker)}
    assert shown <= {text_of(prompt) for prompt in given if prompt not in [row.prompt for row in rows]}
