"""examples/ on the tiny model, and what README prints of them."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import ppo
from tasks.ppo.params import PPOParams
from tests.imports import ROOT
from tests.tiny import tiny_model_dir

SMALL = replace(
    ppo.settings(4),
    batch_size=4,
    samples_per_prompt=2,
    minibatch_size=2,
    micro_batch_size=2,
    trainable_layers=1,
    epochs=1,
    eval_prompts=4,
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def settings(updates: int) -> PPOParams:
        return replace(SMALL, updates=updates)

    monkeypatch.setattr(ppo, "settings", settings)
    monkeypatch.setattr(ppo, "MAX_NEW_TOKENS", 8)
    return str(tiny_model_dir(tmp_path / "tiny"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    policy = AutoModelForCausalLM.from_pretrained(folder)
    return dict(policy.state_dict())


def test_ppo_stopped_goes_on_to_the_same_bits_and_saves_for_transformers(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ppo.main(["--model", model, "--updates", "3", "--out", str(whole)]) == 0
    said = capsys.readouterr().out
    for update in (1, 2, 3):
        assert f"update {update}: score" in said
    assert re.search(r"on 4 held-out prompts +before +after\nreward +\d", said)
    assert said.count("before: ") == said.count("after: ") == 4

    calls = 0

    def stopped(prompts: list[str], responses: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:  # the held-out prompts, update 1, update 2
            raise KeyboardInterrupt
        return personal(prompts, responses)

    personal = ppo.personal
    monkeypatch.setattr(ppo, "personal", stopped)
    command = ["--model", model, "--updates", "3", "--out", str(broken)]
    assert ppo.main(command) == 130
    assert not (broken / "policy").exists()
    assert "the same command goes on" in capsys.readouterr().err
    assert ppo.main(command) == 0
    assert "resuming at update 1 of 3" in capsys.readouterr().err
    expected, found = weights(whole / "policy"), weights(broken / "policy")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert not (broken / "checkpoints").exists()
    assert AutoTokenizer.from_pretrained(broken / "policy").chat_template


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--updates", "0"], "updates is 0"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--out", "taken"], "--out"),
    ],
    ids=["updates", "model", "out"],
)
def test_a_mistake_is_told_without_a_traceback(
    arguments: list[str],
    words: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "taken/policy").mkdir(parents=True)
    assert ppo.main([*(["--model", model] if "--model" not in arguments else []), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error[error.index("error: ") :]


@pytest.mark.parametrize("start", [["examples/ppo.py"], ["-m", "examples.ppo"]], ids=["file", "module"])
def test_help_needs_no_torch(start: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # as `pip install -e .` would have it
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *start, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(option in done.stdout for option in ("--model", "--updates", "--out"))
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_readme_prints_what_the_example_does() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## PPO\n")[2].partition("\n### ")[0]
    blocks: list[str] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    source = (ROOT / "examples/ppo.py").read_text(encoding="utf-8")
    assert blocks
    for block in blocks:
        assert any(textwrap.indent(block, " " * depth) in source for depth in (0, 4, 8)), (
            f"not in the example:\n{block}"
        )


def test_the_reward_is_a_number_for_each_response() -> None:
    assert ppo.personal(["a", "b", "c"], ["You and your kettle", "Thou", "you " * 9]) == [2, 0, 4]
