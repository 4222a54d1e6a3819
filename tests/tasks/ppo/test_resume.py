"""A PPO run that is killed at any moment, and one that is loaded anew, end with the bits of one that never stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.checkpoints import Checkpoints
from tasks.ppo.ptx import Text
from tasks.ppo.trainer import PPOTrainer
from tests.killing import Ran, finish_apart, run_apart, within, written_by
from tests.tasks.ppo.test_pipeline import run_stage, stage_models
from tests.tasks.ppo.toy import Folders, make_trainer, trained_weights, without_times

# all that has a state is on
EVERYTHING: dict[str, Any] = {
    "updates": 5,
    "schedule": "cosine",
    "warmup_share": 0.2,
    "ema_decay": 0.9,
    "kl_target": 0.5,
    "kl_horizon": 50,
    "normalise_scores": True,
    "ptx_coef": 0.5,
    "ptx_examples_per_episode": 1,
    "eval_every": 2,
    "eval_prompts": 2,
    "patience": 9,
    "value_warmup_epochs": 1,
    "epochs": 2,
}
PHASES = (PPOTrainer.sample, PPOTrainer.score, PPOTrainer.train_minibatch, Checkpoints.save)


def noisy(prompts: list[Any], responses: list[Any]) -> list[float]:
    """A reward that draws from the generators that everybody shares."""
    return [len(row) + random.random() + float(torch.rand(())) for row in responses]


@pytest.mark.parametrize("value", ["separate", "head"])
@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_a_loaded_state_goes_on_with_the_same_bits(
    folders: Folders, tmp_path: Path, value: str, stop_after: int
) -> None:
    def trainer() -> PPOTrainer:
        random.seed(5)
        torch.manual_seed(5)
        return make_trainer(
            folders, reward=noisy, arguments={"pretraining": [Text([5], [6, 7])]}, value=value, **EVERYTHING
        )

    whole = trainer()
    expected = [without_times(row) for row in whole]

    first = trainer()
    rows = []
    for row in first:
        rows.append(without_times(row))
        if first.update == stop_after:
            break
    tensors, facts = first.state()
    checkpoints = Checkpoints(tmp_path, fingerprint="x")
    checkpoints.save(stop_after, tensors, facts)
    loaded = checkpoints.latest()
    assert loaded is not None
    second = trainer()
    second.load_state(loaded.tensors, loaded.facts)
    rows += [without_times(row) for row in second]
    assert rows == expected
    assert all(map(torch.equal, trained_weights(second), trained_weights(whole)))
    assert torch.equal(second.roles.value.head.weight, whole.roles.value.head.weight)
    assert second.kept_update == whole.kept_update
    assert second.watch.state() == whole.watch.state()
    assert second.held_out_start == whole.held_out_start
    assert second.kl_controller.coefficient == whole.kl_controller.coefficient


@pytest.fixture(scope="module")
def stage_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return stage_models(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(stage_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, dict[str, str]]:
    """A run that nothing stopped, and what it wrote."""
    root = tmp_path_factory.mktemp("whole") / "repo"
    ran = run_apart(killed_stage, root, stage_folders, phases=PHASES)
    return ran, written_by(root, "ppo")


def killed_stage(root: Path, models: dict[str, Path]) -> None:
    run_stage(root, models, **{**EVERYTHING, "updates": 4, "checkpoint_every": 1})


def test_killed_at_twenty_moments_it_ends_with_the_same_bits(
    stage_folders: dict[str, Path], whole: tuple[Ran, dict[str, str]], tmp_path: Path
) -> None:
    """Five each while it generates, scores, trains, and writes a checkpoint."""
    ran, expected = whole
    assert {Path(name).suffix for name in expected} >= {".safetensors", ".csv", ".json"}
    assert len(ran.saves) == 3
    draw = random.Random(7)
    found = []
    for phase in PHASES:
        for kill_at in within(ran.spans[phase.__qualname__], draw, 5):
            root = tmp_path / str(kill_at)
            assert run_apart(killed_stage, root, stage_folders, kill_at=kill_at).killed
            found.append(len(list(root.glob(".rlhf/checkpoints/ppo/*/step-*"))))
            finish_apart(killed_stage, root, stage_folders)
            assert written_by(root, "ppo") == expected, f"killed in {phase.__qualname__}, at call {kill_at}"
    assert len(found) == 20
    assert sum(map(bool, found)) >= 10, "most were killed after their first checkpoint"


def test_a_torn_and_a_foreign_checkpoint_are_refused_and_the_one_before_is_used(
    stage_folders: dict[str, Path],
    whole: tuple[Ran, dict[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran, expected = whole
    root = tmp_path / "torn"
    run_apart(killed_stage, root, stage_folders, kill_at=ran.saves[-1][1] + 50)
    newest = sorted(root.glob(".rlhf/checkpoints/ppo/*/step-*"))
    assert [path.name for path in newest] == ["step-000002", "step-000003"]
    tensors = newest[-1] / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    killed_stage(root, stage_folders)
    said = capsys.readouterr().err
    assert "step-000003 is not used: tensors.safetensors is torn" in said
    assert "ppo: resuming at update 2 of 4" in said
    assert written_by(root, "ppo") == expected

    root = tmp_path / "foreign"
    run_apart(killed_stage, root, stage_folders, kill_at=ran.saves[-1][1] + 50)
    manifest = sorted(root.glob(".rlhf/checkpoints/ppo/*/step-*/manifest.json"))[-1]
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "fingerprint": "of another run"}))
    killed_stage(root, stage_folders)
    assert "it is of another run" in capsys.readouterr().err
    assert written_by(root, "ppo") == expected
