"""Quick runs: what they change, and what they leave as it is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.quick import FOLDER, MOST_ROWS, RECORDED, quick_folder, reduced, thin_out
from flows.workspace import change_params
from tasks.datasets import flat
from tasks.params import Params, load_params
from tasks.stage import UserError
from tasks.tracking import QUICK_EXPERIMENT
from tests.flows.toy import ROOT
from tests.tiny import shell, tiny_repo

SHARES = ("sft.validation_share", "rank.held_out_share")
yaml = YAML(typ="safe")


def with_changes(folder: Path, changes: dict[str, Any]) -> Params:
    file = folder / "params.yaml"
    file.write_text((ROOT / "params.yaml").read_text())
    change_params(file, changes)
    return load_params(file)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"demonstrate.prompts": 9, "sample.prompts": 7, "baseline.prompts": 5, "ppo.eval_prompts": 3, "ppo.updates": 1},
        {"ppo.batch_size": 36, "ppo.samples_per_prompt": 3, "ppo.minibatch_size": 12, "ppo.micro_batch_size": 3},
        {"ppo.batch_size": 6, "ppo.samples_per_prompt": 1, "ppo.minibatch_size": 3, "ppo.micro_batch_size": 5},
        {"sft.trainable_layers": "all", "reward.trainable_layers": 1, "rank.held_out_share": 0.0},
    ],
    ids=["default", "small", "threes", "ones", "layers"],
)
def test_sizes_become_smaller_and_never_larger(changes: dict[str, Any], tmp_path: Path) -> None:
    before = with_changes(tmp_path, changes)
    values = reduced(before)
    change_params(tmp_path / "params.yaml", values)
    load_params(tmp_path / "params.yaml")  # they fit together
    known = flat(before.model_dump(mode="json", by_alias=True))
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in SHARES:
            assert known[key] == "all" or value <= known[key], key
    assert not {key for key in values if key.startswith(("seed", "text", "base.", "tickets", "data", "prepare"))}, (
        "the long run takes over what these make"
    )
    assert values["register.enabled"] is False
    assert values["rank.held_out_share"] == 0 or before.rank.held_out_share > 0


def test_recorded_labels_are_thinned_out_where_they_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = [
        {"kind": "demonstrations", "path": "data/raw/ours.jsonl", "weight": 0.5},
        {"kind": "rankings", "path": "data/raw/pairs.jsonl", "splits": {"reward": 0.9, "eval": 0.1}},
    ]
    with_changes(tmp_path, {"data.sources": sources, "demonstrate.labeler": "recorded", "rank.labeler": "recorded"})
    for kind, rows in {"demonstrations": 4 * MOST_ROWS, "rankings": 60}.items():
        RECORDED[kind].parent.mkdir(parents=True)
        RECORDED[kind].write_text("{}\n" * rows)
    assert thin_out()
    ours, pairs = load_params(Path("params.yaml")).data.sources
    assert (ours.weight, pairs.weight) == (0.125, 1.0)
    assert pairs.splits == {"reward": 0.9, "eval": 0.1}

    RECORDED["demonstrations"].write_text("{}\n" * MOST_ROWS)
    assert not thin_out(), "few enough"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    repo = tiny_repo(tmp_path / "repo")
    (repo / ".gitignore").write_text("/.rlhf/\n")
    (repo / "data/raw").mkdir(parents=True)
    (repo / "tasks").mkdir()
    (repo / "tasks/code.py").touch()
    with_changes(repo, {})
    shell(repo, "git", "add", ".")
    shell(repo, "git", "commit", "--quiet", "-m", "Code")
    monkeypatch.chdir(repo)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return repo


def test_the_working_tree_as_it_is_and_untouched(home: Path) -> None:
    change_params(home / "params.yaml", {"ppo.kl_coef": 0.5})  # not committed
    (home / "data/raw/mine.jsonl").write_text("{}\n")
    before = (home / "params.yaml").read_bytes()
    state = shell(home, "git", "status", "--porcelain")
    cache = shell(home, "dvc", "cache", "dir").strip()
    for new in (False, True):
        if new:
            (home / "tasks/new.py").touch()
            (home / "tasks/code.py").unlink()
            state = shell(home, "git", "status", "--porcelain")
        with quick_folder():
            assert Path.cwd() == home / FOLDER
            own = load_params(Path("params.yaml"))
            assert (own.ppo.kl_coef, own.sft.epochs, own.register_.enabled) == (0.5, 1, False)
            assert Path("data/raw/mine.jsonl").exists()
            assert Path("tasks/new.py").exists() == new
            assert Path("tasks/code.py").exists() != new
            assert not Path(".git").exists()
            assert os.environ["RLHF_EXPERIMENT"] == QUICK_EXPERIMENT
            assert os.environ["RLHF_SENDS"] == "flow"
            assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{home / 'mlflow.db'}"
            assert shell(Path(), "dvc", "cache", "dir").strip() == cache, "what both runs make is made once"
            Path("data/made").mkdir(exist_ok=True)
            with contextlib.chdir(home), pytest.raises(UserError, match="in use by another process"), quick_folder():
                pass
    assert not {"RLHF_EXPERIMENT", "RLHF_SENDS"} & set(os.environ)
    assert (home / "params.yaml").read_bytes() == before
    assert not (home / "data/made").exists()
    assert (home / FOLDER / "data/made").exists(), "the next quick run goes on from there"
    assert shell(home, "git", "status", "--porcelain") == state
