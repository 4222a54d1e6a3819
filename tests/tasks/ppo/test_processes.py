"""Two processes on one machine, through gloo, train as one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tasks.ppo.ptx import Text
from tasks.stage import UserError
from tests.tasks.ppo.toy import Folders, gradients, judged, make_trainer, trained_weights, without_times

TEXTS = [Text([5, 6, 7], [8, 9, 2]), Text([10], [11, 12, 13]), Text([20, 21], [2])]
OPTIONS: dict[str, Any] = {
    "samples_per_prompt": 2,
    "minibatch_size": 4,  # of 16: of some minibatches a process has more rows than the other
    "micro_batch_size": 2,
    "epochs": 2,
    "whiten_rewards": True,
    "normalise_scores": True,
    "kl_target": 1.0,
    "ptx_coef": 1.0,
    "ptx_examples_per_episode": 1,
    "eval_every": 1,
    "eval_prompts": 2,
    "value_warmup_epochs": 1,
}


def work(folders: Folders, out: Path) -> None:
    """Gradients of one minibatch, then a whole run."""
    torch.set_num_threads(1)
    trainer = make_trainer(folders, arguments={"pretraining": TEXTS}, **OPTIONS)
    found, figures = gradients(trainer, judged(trainer), torch.tensor([0, 1, 2, 3, 4, 5, 14, 15]))
    whole = make_trainer(folders, arguments={"pretraining": TEXTS}, **OPTIONS)
    history = [without_times(row) for row in whole]
    result = {
        "processes": whole.processes.count,
        "gradients": found,
        "figures": figures,
        "history": history,
        "weights": trained_weights(whole),
    }
    torch.save(result, out)


def run_two(folders: Folders, root: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    code = (
        "import sys; from pathlib import Path; from tests.tasks.ppo.test_processes import Folders, work;"
        "work(Folders(Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3]))"
    )
    started = []
    for rank in ("0", "1"):
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", code, *map(str, folders), str(root / rank)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    ended = [(process.communicate(timeout=240)[1], process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0], "\n".join(errors for errors, _ in ended)
    return [torch.load(root / rank, weights_only=True) for rank in ("0", "1")]


def largest(tensors: list[Tensor]) -> float:
    return max(tensor.abs().max().item() for tensor in tensors)


def test_two_processes_give_the_gradients_and_the_run_of_one(folders: Folders, tmp_path: Path) -> None:
    work(folders, tmp_path / "alone")
    alone = torch.load(tmp_path / "alone", weights_only=True)
    both = run_two(folders, tmp_path)
    assert [result["processes"] for result in (alone, *both)] == [1, 2, 2]
    assert all(map(torch.equal, both[0]["weights"], both[1]["weights"])), "they hold the same weights"
    assert both[0]["history"] == both[1]["history"]
    assert_close(both[0]["gradients"], alone["gradients"], rtol=1e-4, atol=1e-6 * largest(alone["gradients"]))
    assert both[0]["figures"] == pytest.approx(alone["figures"], rel=1e-4, abs=1e-6)
    assert len(alone["history"]) == 2
    for row, expected in zip(both[0]["history"], alone["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert_close(both[0]["weights"], alone["weights"], rtol=1e-3, atol=1e-4)


def test_a_batch_that_does_not_divide_over_the_processes(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    class Three:
        process_index, num_processes, device = 0, 3, torch.device("cpu")

    monkeypatch.setattr("tasks.ppo.processes.Accelerator", Three)
    with pytest.raises(UserError, match="batch_size 16 does not divide over 3 processes with 4 samples a prompt"):
        make_trainer(folders)
