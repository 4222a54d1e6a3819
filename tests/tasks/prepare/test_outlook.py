"""What later stages ask for is said at the end of prepare, all at once, with values that fit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

from tasks import demands, judge, rank, sft
from tasks.conversations import single
from tasks.datasets import Prompt, prompt_id
from tasks.demands import Misfit
from tasks.demonstrate import choose_prompts
from tasks.lineage import load_stages
from tasks.params import Params, load_params
from tasks.prepare import machine, outlook, pipeline
from tasks.prepare.outlook import Supply, misfits, with_values
from tests.imports import ROOT

PARAMS = load_params(ROOT / "params.yaml")
IDS = np.array([int(prompt_id(single(f"prompt {number}")), 16) for number in range(400)], np.uint64)
NOTHING = pd.DataFrame({"id": IDS[:0], "pairs": np.empty(0, int), "tied_pairs": np.empty(0, int)})


def ranked(count: int, tied: int = 0, first: int = 0) -> pd.DataFrame:
    return pd.DataFrame({"id": IDS[first : first + count], "pairs": 1, "tied_pairs": [1] * tied + [0] * (count - tied)})


def supply(**changes: Any) -> Supply:
    """Enough for params.yaml: 300 tickets a split."""
    splits: Any = dict.fromkeys(("sft", "reward", "ppo", "eval"), IDS[:300])
    plain = Supply(splits, IDS[:0], {"reward": NOTHING, "eval": NOTHING}, set(IDS.tolist()), 30)
    return plain._replace(**{"prompts": splits | changes.pop("prompts", {})}, **changes)


def found(values: dict[str, Any], there: Supply) -> dict[str, Any]:
    """{key: value that fits}; of a misfit without one its first words."""
    every = list(misfits(with_values(PARAMS, values), there))
    return {key: value for one in every for key, value in (one.fit or {one.message[:24]: None}).items()}


def test_the_default_fits() -> None:
    assert found({}, supply()) == {}


LAYERS = ("sft.trainable_layers", "reward.trainable_layers", "ppo.trainable_layers")
NO_ORDER = {"0 rankings to train on a": None}
RECORDED = {"demonstrate.labeler": "recorded", "rank.labeler": "recorded"}
OWN = {"demonstrations": IDS[:54], "rankings": {"reward": ranked(54), "eval": ranked(6, first=300)}, "tickets": set()}
NOT_HELD_OUT = OWN | {"rankings": {"reward": ranked(9), "eval": NOTHING}}


@pytest.mark.parametrize(
    ("values", "there", "fit"),
    [
        ({}, {"prompts": {"eval": IDS[:9]}}, {"baseline.prompts": 9}),
        ({}, {"prompts": {"eval": IDS[:1]}}, {"baseline.prompts is 128,": None}),
        ({}, {"prompts": {"sft": IDS[:40]}}, {"demonstrate.prompts": 40}),
        ({}, {"prompts": {"reward": IDS[:50]}}, {"sample.prompts": 50}),
        ({}, {"prompts": {"ppo": IDS[:30]}}, {"ppo.eval_prompts": 7}),
        ({}, {"prompts": {"ppo": IDS[:6]}}, {"ppo.eval_prompts": 4}),
        ({"ppo.eval_every": 0, "ppo.patience": None}, {"prompts": {"ppo": IDS[:6]}}, {}),
        ({}, {"layers": 6}, dict.fromkeys(LAYERS, 6)),
        ({}, OWN, RECORDED),
        ({"demonstrate.labeler": "human", "rank.labeler": "human"}, OWN | {"demonstrations": IDS[:0]}, {}),
        (RECORDED, OWN, {}),
        (RECORDED, {}, {"demonstrate.labeler is `": None, "rank.labeler is `recorde": None}),
        (RECORDED, OWN | {"rankings": {"reward": ranked(9, tied=9), "eval": ranked(6, first=300)}}, NO_ORDER),
        (RECORDED | {"rank.held_out_share": 0.0}, NOT_HELD_OUT, "held out"),
        (RECORDED | {"rank.held_out_share": 0.001}, NOT_HELD_OUT, "held out"),
        (RECORDED | {"sft.validation_share": 0.001}, OWN, "validation"),
        (RECORDED | {"reward.label_share": 1e-9}, OWN, NO_ORDER),
    ],
)
def test_a_misfit_and_what_would_fit(values: dict[str, Any], there: dict[str, Any], fit: Any) -> None:
    had = found(values, supply(**there))
    if isinstance(fit, str):
        (key,) = had
        assert key == {"held out": "rank.held_out_share", "validation": "sft.validation_share"}[fit]
        assert found(values | had, supply(**there)) == {}
    else:
        assert had == fit


def test_draws_are_those_of_the_stages() -> None:
    ids = outlook.hexadecimal(IDS)
    assert [outlook.validation_draw(1, id) for id in ids] == [sft.validation_draw(1, id) for id in ids]
    assert judge.FEWEST_PAIRS == outlook.FEWEST_PAIRS
    prompts = [Prompt(id=id, prompt=single("x")) for id in ids]
    chosen = [row.id for row in choose_prompts(prompts, 5, PARAMS.seed)]
    share = max(sft.validation_draw(1, id) for id in chosen) / 2
    apart = sum(sft.validation_draw(1, id) < share for id in chosen)
    told = demands.validation_sides(0.0, [0.5])
    assert told
    few = with_values(PARAMS, {"demonstrate.prompts": 5, "sft.validation_share": 0.0})
    (wrong,) = [one for one in misfits(few, supply()) if "validation" in one.message]
    assert with_values(few, wrong.fit).sft.validation_share > min(sft.validation_draw(1, id) for id in chosen)
    assert 0 <= apart < 5
    few = with_values(PARAMS, {"sample.prompts": 5, "rank.held_out_share": 0.0001})
    (wrong,) = [one for one in misfits(few, supply()) if "held_out" in one.message]
    taken = [rank.is_held_out(id, PARAMS.seed, wrong.fit["rank.held_out_share"]) for id in ids[:5]]
    assert 0 < sum(taken) < 5


@pytest.mark.parametrize(
    ("draws", "share"),
    [
        ([], None),
        ([0.3], None),
        ([0.3, 0.3], None),
        ([0.305, 0.9], 0.31),
        ([0.301, 0.302], 0.3015),
        ([n / 10 for n in range(10)], 0.11),
    ],
)
def test_share_with_both_sides(draws: list[float], share: float | None) -> None:
    assert demands.share_with_both_sides(draws) == (share if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model", None),
        ("r.py:good", None),
        ("r.py:made", None),
        ("other.py:f", None),
        ("r.py:bad", "r.py has no function `bad`"),
        ("r.py", "neither `model` nor"),
        ("none.py:f", "there is no file none.py"),
        ("torn.py:f", "cannot be imported: SyntaxError"),
        ("far.py:f", "add far.py to the deps of the stage `ppo`"),
    ],
)
def test_reward_functions(tmp_path: Path, name: str, said: str | None) -> None:
    (tmp_path / "r.py").write_text("raise SystemExit\ndef good(): ...\nmade = lambda: 1\n")
    (tmp_path / "other.py").write_text("from r import *\n")
    (tmp_path / "torn.py").write_text("def f(:\n")
    (tmp_path / "far.py").write_text("def f(): ...\n")
    misfit = demands.reward_function(name, ["r.py", "other.py", "torn.py"], tmp_path)
    assert misfit is None if said is None else misfit and said in misfit.message


def test_files_that_no_stage_writes(tmp_path: Path) -> None:
    params = with_values(PARAMS, {"ppo.rewards": {"model": 1.0, "r.py:f": 0.1}})
    said = [one.message for one in outlook.of_files(params, load_stages(ROOT), tmp_path)]
    assert [text.split(" ")[0] for text in said[1:]] == [
        f"data/labels/{name}.jsonl" for name in ("demonstrations", "arena", "rankings")
    ]
    assert "no file r.py" in said[0]


def test_remarks() -> None:
    values = {"baseline.prompts": 4, "judge.endpoint": "http://127.0.0.1:1", "judge.model": "m"} | RECORDED
    said = list(outlook.remarks(with_values(PARAMS, values), supply(**OWN, prompts={"ppo": IDS[:40]})))
    assert [text.split(" ")[0] for text in said] == ["baseline.best_of_prompts", "an", "judge.pairs", "the"]
    assert "order 6 pairs" in said[3]
    assert not list(outlook.remarks(PARAMS, supply()))


def test_the_block_can_be_read_as_yaml() -> None:
    values = {"baseline.prompts": 9, "prepare.share_prompts": True, "rank.labeler": "recorded", "baseline.best_of": 2}
    assert YAML(typ="safe").load(outlook.as_block(values)) == {
        "baseline": {"prompts": 9, "best_of": 2},
        "prepare": {"share_prompts": True},
        "rank": {"labeler": "recorded"},
    }


def too_long(prompt: int, response: int, row: int) -> dict[str, Any]:
    return {"file": "f", "row": row, "prompt_tokens": prompt, "response_tokens": response}


@pytest.mark.parametrize(
    ("rows", "most", "fit"),
    [
        ([(10, 100), (10, 90), (10, 80)], 512, {"text.max_response_tokens": 96}),  # one in twenty may be too long
        ([(70, 20), (65, 20)], 512, {"text.max_prompt_tokens": 72}),
        ([(70, 90)] * 3, 512, {"text.max_prompt_tokens": 72, "text.max_response_tokens": 96}),
        ([(10, 500), (10, 90), (10, 480)], 512, {"prepare.damaged_limit": 0.15}),
        ([(0, 0)] * 3, 512, {}),
    ],
)
def test_lengths_that_fit(rows: list[tuple[int, int]], most: int, fit: dict[str, Any]) -> None:
    damaged = pd.DataFrame([too_long(*lengths, row) for row, lengths in enumerate(rows)])
    assert pipeline.lengths_that_fit(damaged, 20, PARAMS, most) == fit


def test_folders_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere: what the system would say is put in its place."""
    (tmp_path / "data/models").mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store/mlflow.db")
    (tmp_path / "store").mkdir()
    locked = {tmp_path / "data/models", tmp_path / "store"}
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) not in locked)
    assert machine.unwritable(tmp_path, load_stages(ROOT)) == sorted(map(str, locked))
    locked.clear()
    assert machine.unwritable(tmp_path, load_stages(ROOT)) == []


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A million parameters, of which 30 layers have half."""
    config = {"num_hidden_layers": 30, "vocab_size": 5000, "hidden_size": 100, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(bytes(4_000_000))
    return tmp_path


@pytest.mark.parametrize(
    ("layers", "there", "cache", "least", "likely"),
    [
        (3, 0, None, 16_000_000, 16_000_000 + 3 * 32 * 50_000),
        ("all", 1, None, 12_000_000, 12_000_000 + 3 * 32 * 1_000_000),
        (3, 0, "copy", 16_000_000, 32_000_000 + 3 * 32 * 50_000),
        (3, 0, "hardlink", 16_000_000, 16_000_000 + 3 * 32 * 50_000),
    ],
)
def test_room_on_the_disk(
    tmp_path: Path, model: Path, layers: Any, there: int, cache: str | None, least: int, likely: int
) -> None:
    root = tmp_path / "root"
    for name in machine.MODELS[:there]:
        (root / f"data/models/{name}").mkdir(parents=True)
    if cache:
        (root / ".dvc").mkdir(parents=True)
        (root / ".dvc/config").write_text(f'[cache]\n    type = "{cache}"\n')
    (room,) = machine.rooms(root, model, {"sft": layers, "reward": layers, "ppo": layers})
    assert (room.least, room.likely) == (least, likely)
    short = room._replace(free=least - 1), room._replace(free=likely - 1), room._replace(free=likely)
    assert [tuple(map(len, machine.of_room([one]))) for one in short] == [(1, 0), (0, 1), (0, 0)]


def test_every_rule_has_its_stage() -> None:
    """A rule that only prepare goes by, or only a stage, would be told late or wrongly."""
    code = {path.stem: path.read_text() for path in (ROOT / "tasks").glob("*.py")}
    code["ppo"] = (ROOT / "tasks/ppo/pipeline.py").read_text()
    ahead = (ROOT / "tasks/prepare/outlook.py").read_text()
    rules = [
        name
        for name, rule in vars(demands).items()
        if getattr(rule, "__annotations__", {}).get("return") == "Misfit | None"
    ]
    assert len(rules) == 11
    for name in rules:
        users = [stage for stage, text in code.items() if f"{name}(" in text and stage != "demands"]
        assert f"demands.{name}(" in ahead
        assert users or name == "trained_layers"  # models.py has that one


def test_misfit_has_a_message() -> None:
    with pytest.raises(Exception, match="no room"):
        demands.require(Misfit("no room"))
    demands.require(None)


def test_params_keep_what_is_not_changed() -> None:
    assert with_values(PARAMS, {}) == PARAMS
    assert isinstance(with_values(PARAMS, {"baseline.prompts": 9}), Params)
