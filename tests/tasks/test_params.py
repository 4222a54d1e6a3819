"""Mistakes in params.yaml: each is named, with what to do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

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
    assert "unknown key `register.zzz`; known here: approval, gates" in said


def test_wrong_type_and_range_tell_the_value(tmp_path: Path) -> None:
    assert "`register.approval`" in complaint(tmp_path, changed("approval: false", "approval: [1]"))
    said = complaint(tmp_path, changed("seed: 1\n", "seed: -1\n"))
    assert "`seed`" in said
    assert "(it is -1)" in said


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
