"""The stage `ppo` on tiny models."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tasks.datasets import Prompt, prompt_id, write_rows
from tasks.lineage import load_stages
from tasks.models import load_language_model, load_scalar_model, load_tokenizer, save_model, shared_depth
from tasks.params import load_params
from tasks.ppo import run
from tasks.stage import Stage, UserError
from tests.tiny import tiny_model_dir

DEFAULTS = load_params(Path("params.yaml"))
PPO = DEFAULTS.ppo.model_copy(
    update={
        "trainable_layers": 1,
        "updates": 2,
        "batch_size": 8,
        "samples_per_prompt": 2,
        "minibatch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 3e-3,
    }
)
TEXTS = ["hello dear", "your order is late", "refund it", "sorry", "by monday", "ticket 7"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ppo")
    sft = load_language_model(tiny_model_dir(root / "sft", seed=3))
    reward = load_scalar_model(tiny_model_dir(root / "other", reward=True, seed=4))
    reward.model.embed_tokens.load_state_dict(sft.model.embed_tokens.state_dict())
    reward.model.layers[0].load_state_dict(sft.model.layers[0].state_dict())
    save_model(reward, load_tokenizer(root / "sft"), root / "reward")
    return {"sft": root / "sft", "reward": root / "reward"}


def run_stage(root: Path, folders: dict[str, Path], **changes: Any) -> Mock:
    write_rows(root / "data/prepared/prompts/ppo.jsonl", [Prompt(id=prompt_id(text), prompt=text) for text in TEXTS])
    (root / "data/models").mkdir(parents=True)
    for name, folder in folders.items():
        (root / f"data/models/{name}").symlink_to(folder)
    params = DEFAULTS.model_copy(
        update={
            "ppo": PPO.model_copy(update=changes),
            "text": DEFAULTS.text.model_copy(update={"max_response_tokens": 6}),
        }
    )
    tracker = Mock()
    stage = Stage(load_stages()["ppo"], params, tracker, root=root)
    run(stage)
    stage.commit()
    return tracker


def test_the_stage_and_its_report(folders: dict[str, Path], tmp_path: Path) -> None:
    tracker = run_stage(tmp_path / "one", folders)
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
    report = json.loads((reports / "metrics.json").read_text())["ppo"]
    assert report["updates"] == 2
    assert {"score", "kl", "approx_kl", "clip_fraction", "policy_loss", "value_loss"} <= set(report)
    assert report["score"] == float(history[-1]["score"])
    logged = [call.args for call in tracker.metrics.call_args_list if "ppo/score" in call.args[0]]
    assert [step for _, step in logged] == [1, 2]
    assert logged[1][0]["ppo/kl"] == report["kl"]
    name, rows = tracker.table.call_args.args
    assert name == "ppo_samples"
    assert len(rows) == 8
    assert all(row["prompt"].startswith("<|im_start|>user\n") for row in rows)

    run_stage(tmp_path / "two", folders)
    files = [path.relative_to(tmp_path / "one") for path in (*models.glob("[pv]*/*"), *reports.iterdir())]
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_prompt": 3}, r"ppo\.batch_size 8 is not a multiple of ppo\.samples_per_prompt 3"),
        ({"minibatch_size": 3}, r"ppo\.minibatch_size 3 is not a multiple of ppo\.samples_per_prompt 2"),
        ({"minibatch_size": 10}, r"ppo\.minibatch_size 10 is larger than ppo\.batch_size 8"),
        ({"trainable_layers": 3}, r"trainable_layers is 3, and the model has 2 layers"),
    ],
)
def test_settings_that_do_not_fit(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_stage(tmp_path, folders, **changes)


def test_a_reward_model_with_another_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_model_dir(tmp_path / "other", reward=True, texts=["quite another text"])
    with pytest.raises(UserError, match="different tokenizers"):
        run_stage(tmp_path / "repo", {**folders, "reward": other})
