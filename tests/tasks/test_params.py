"""Mistakes in params.yaml: each is named, with what to do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from dvc.utils import serialize

from tasks.params import load_params
from tasks.stage import UserError

GOOD = (Path(__file__).parents[2] / "params.yaml").read_text()


def complaint(tmp_path: Path, text: str) -> str:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_params(file)
    return str(error.value)


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_the_default_is_good(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(GOOD)
    assert load_params(tmp_path / "params.yaml").register_.gates.kl == 40


def test_unknown_key_is_named_with_the_nearest(tmp_path: Path) -> None:
    said = complaint(tmp_path, changed("  kl_coef:", "  kl_koef:"))
    assert "unknown key `ppo.kl_koef`; did you mean `kl_coef`?" in said
    assert "key `ppo.kl_coef` is missing" in said
    assert str(tmp_path / "params.yaml") in said


def test_unknown_section_and_nested_key(tmp_path: Path) -> None:
    assert "unknown key `evalute`; did you mean `evaluate`?" in complaint(
        tmp_path, changed("\nevaluate:", "\nevalute:")
    )
    assert "unknown key `prepare.splits.evl`; did you mean `eval`?" in complaint(tmp_path, changed(" eval: ", " evl: "))


def test_unknown_key_in_an_optional_section(tmp_path: Path) -> None:
    text = re.sub(r"lora: null.*", "lora: {rnak: 4, alpha: 8}", GOOD)
    assert "unknown key `sft.lora.rnak`; did you mean `rank`?" in complaint(tmp_path, text)


def test_unknown_key_that_is_near_none_lists_the_known(tmp_path: Path) -> None:
    said = complaint(tmp_path, changed("  approval:", "  zzz: 1\n  approval:"))
    assert "unknown key `register.zzz`; known here: enabled, approval, gates" in said


def test_wrong_type_and_range_tell_the_value(tmp_path: Path) -> None:
    assert "`register.approval`" in complaint(tmp_path, changed("approval: false", "approval: [1]"))
    said = complaint(tmp_path, changed("seed: 1\n", "seed: -1\n"))
    assert "`seed`" in said
    assert "(it is -1)" in said


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("kl_coef: 0.02", 'kl_coef: "0.02"', "ppo.kl_coef"),
        ("kl_coef: 0.02", "kl_coef: true", "ppo.kl_coef"),
        ("kl_target: null", 'kl_target: "6"', "ppo.kl_target"),
        ("updates: 8", "updates: 8.0", "ppo.updates"),
        ("updates: 8", "updates: 2.5", "ppo.updates"),
        ("whiten_advantages: true", "whiten_advantages: yes", "ppo.whiten_advantages"),
        ("whiten_advantages: true", "whiten_advantages: 1", "ppo.whiten_advantages"),
        ("adam_betas: [0.9, 0.95]", 'adam_betas: ["0.9", 0.95]', "ppo.adam_betas"),
        ("rewards: {model: 1.0}", 'rewards: {model: "1.0"}', "ppo.rewards"),
        ("learning_rate: 5.0e-4", 'learning_rate: "1e-4"', "sft.learning_rate"),
        ("count: 4800", "count: 4800.0", "tickets.count"),
        ("count: 4800", "count: true", "tickets.count"),
        ("approval: false", "approval: no", "register.approval"),
        ("approval: false", "approval: 0", "register.approval"),
        ("skill: 0.6", 'skill: "0.6"', "labelers.0.skill"),
        ("padding: 0.2", 'padding: "0.2"', "labelers.3.habits.padding"),
        ("sampling: {temperature: 0,", 'sampling: {temperature: "0",', "judge.sampling"),
        ("share_prompts: false", 'share_prompts: "false"', "prepare.share_prompts"),
    ],
)
def test_values_keep_their_types(tmp_path: Path, old: str, new: str, key: str) -> None:
    said = complaint(tmp_path, changed(old, new))
    assert f"`{key}`" in said
    assert len(said.splitlines()) == 2


def test_how_a_text_may_have_been_meant(tmp_path: Path) -> None:
    assert "a number stands without quotation marks" in complaint(tmp_path, changed("seed: 1\n", 'seed: "1"\n'))
    assert "true, without quotation marks" in complaint(tmp_path, changed("approval: false", "approval: yes"))


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    """YAML 1.1 takes 1e-4 for a text; DVC and this project read YAML 1.2."""
    file = tmp_path / "params.yaml"
    file.write_text(changed("learning_rate: 1.5e-4", f"learning_rate: {text}").replace("gamma: 1.0", "gamma: 1"))
    ppo = load_params(file).ppo
    assert (ppo.learning_rate, ppo.gamma) == (1e-4, 1)
    assert serialize.load_yaml(str(file))["ppo"]["learning_rate"] == 1e-4


def test_shares_that_do_not_add_up(tmp_path: Path) -> None:
    assert "not to 1" in complaint(tmp_path, changed("splits: {sft: 0.3", "splits: {sft: 0.5"))


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    assert "gamma is nan, not a finite number" in complaint(tmp_path, changed("gamma: 1.0", "gamma: .nan"))


def test_files_that_are_no_params(tmp_path: Path) -> None:
    assert "params.yaml, line 2: not valid YAML" in complaint(tmp_path, "a: [1")
    assert "must hold sections" in complaint(tmp_path, "- 1\n")
    assert "must hold sections" in complaint(tmp_path, "")
    unmerged = complaint(tmp_path, "seed: 1\n<<<<<<< HEAD\nppo: {}\n=======\nppo: {updates: 1}\n>>>>>>> other\n")
    assert "params.yaml, line 2" in unmerged
    assert "git checkout --ours" in unmerged
    with pytest.raises(UserError, match="is missing"):
        load_params(tmp_path / "nowhere.yaml")


def test_params_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(GOOD)
    params = load_params(tmp_path / "params.yaml")
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.ppo.kl_coef = 1.0  # type: ignore[misc]
