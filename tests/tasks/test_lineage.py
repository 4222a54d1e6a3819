"""What dvc.yaml, dvc.lock and git say."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tasks.lineage import (
    changed_params,
    git_state,
    hash_path,
    load_stages,
    locked_outs,
    read_lock,
    run_name,
    upstream,
)
from tasks.stage import UserError
from tests.tiny import shell, tiny_repo

DVC_YAML = """
stages:
  last:
    cmd: cat data/b/part
    deps: [data/b/part, tasks/last.py]
    metrics: [{data/report.json: {cache: false}}]
  first:
    cmd: mkdir -p data/a data/b/sub && echo 1 > data/a/x && echo 2 > data/b/part && echo 3 > data/b/sub/file
    params: [seed, ppo.kl_coef]
    outs: [data/a, data/b]
  middle:
    cmd: echo middle > data/c
    deps: [data/a, tasks/ppo]
    outs: [{data/c: {persist: true}}]
    plots: [data/curve.csv]
    meta: {retries: 2}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    return tmp_path


def test_stages_come_in_an_order_in_which_they_can_run(root: Path) -> None:
    names = list(load_stages(root))
    assert set(names) == {"first", "middle", "last"}
    assert names.index("first") < min(names.index("middle"), names.index("last"))


def test_stage_as_declared(root: Path) -> None:
    specs = load_stages(root)
    assert specs["first"].params == ("seed", "ppo.kl_coef")
    assert specs["middle"].outs == ("data/c", "data/curve.csv")
    assert specs["middle"].meta == {"retries": 2}
    assert specs["middle"].data_deps == ("data/a",), "tasks/ppo is code"
    assert specs["last"].outs == ("data/report.json",)
    assert specs["last"].data_deps == ("data/b/part",)


def test_upstream_knows_folders_and_what_lies_in_them(root: Path) -> None:
    assert upstream(load_stages(root)) == {"first": set(), "middle": {"first"}, "last": {"first"}}


def test_a_dep_with_the_same_beginning_is_not_upstream(root: Path) -> None:
    text = DVC_YAML.replace("data/b/part, tasks", "data/bcd, tasks")
    (root / "dvc.yaml").write_text(text)
    assert upstream(load_stages(root))["last"] == set()


def test_hashes_are_those_of_dvc_lock(tmp_path: Path) -> None:
    repo = tiny_repo(tmp_path / "repo")
    (repo / "params.yaml").write_text("seed: 1\nppo: {kl_coef: 0.1}\n")
    (repo / "dvc.yaml").write_text(DVC_YAML)
    assert locked_outs("first", repo) == {}
    shell(repo, "dvc", "repro", "--quiet", "first")
    locked = YAML(typ="safe").load(repo / "dvc.lock")["stages"]["first"]["outs"]
    assert locked_outs("first", repo) == {out["path"]: out["md5"] for out in locked}
    assert locked_outs("first", repo) == {path: hash_path(repo / path) for path in ("data/a", "data/b")}
    assert hash_path(repo / "data/b/part") == "26ab0db90d72e28ad0ba1e22ee510510"  # md5 of "2\n"
    assert locked_outs("middle", repo) == {}


def test_dvc_lock_is_read_while_dvc_writes_it(tmp_path: Path) -> None:
    text = "stages:\n  first:\n    outs: [{path: data/a, md5: '26'}]\n"
    (tmp_path / "dvc.lock").write_text("")
    threading.Timer(0.1, (tmp_path / "dvc.lock").write_text, [text]).start()
    assert locked_outs("first", tmp_path) == {"data/a": "26"}


def test_a_damaged_dvc_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    (tmp_path / "dvc.lock").write_text("stages:\n  first: {outs: [")
    with pytest.raises(UserError, match=r"dvc\.lock is damaged"):
        locked_outs("first", tmp_path)


def test_a_dvc_lock_that_git_could_not_merge_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("nobody is about to write the rest"))
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n<<<<<<< HEAD\n  a: {}\n=======\n  b: {}\n>>>>>>> other\n"
    )
    with pytest.raises(UserError, match=r"dvc\.lock, line 3: .*git checkout --ours"):
        read_lock(tmp_path)


LOCK = """
stages:
  ppo: {params: {params.yaml: {seed: 1, ppo: {kl_coef: 0.02, updates: 8, learning_rate: 0.1}, rank.labeler: simulated}}}
  report: {params: {params.yaml: {seed: 1, ppo: {kl_coef: 0.02, updates: 8, learning_rate: 0.1}}}}
"""


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ("{ppo: {kl_coef: 0.1, updates: 8, learning_rate: 0.1}}", "kl_coef 0.02 → 0.1"),
        ("{sft: {learning_rate: 1}, ppo: {learning_rate: 0.2}}", "ppo.learning_rate 0.1 → 0.2"),
        (
            "{seed: 2, ppo: {kl_coef: 0.1, updates: null}, rank: {labeler: human}}",
            "seed 1 → 2, kl_coef 0.02 → 0.1, +2",
        ),
        ("{seed: 1, new: {key: 1}}", "Higher KL penalty"),
        ("{seed: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}", "seed 1 → …"),
        ("[broken", "Higher KL penalty"),
    ],
    ids=["one", "common-name", "several", "none", "list", "broken"],
)
def test_a_run_is_named_by_what_it_changed(tmp_path: Path, params: str, name: str) -> None:
    repo = tiny_repo(tmp_path / "repo")
    shell(repo, "git", "commit", "--quiet", "--allow-empty", "--message", "Higher KL penalty", "--message", "A body")
    (repo / "dvc.lock").write_text(LOCK)
    (repo / "params.yaml").write_text(params)
    assert run_name(repo) == name


def test_a_run_of_files_that_are_not_committed_names_them(tmp_path: Path) -> None:
    repo = tiny_repo(tmp_path / "repo")
    for file in ("code.py", "more.py", "data/reports/metrics.json", "dvc.lock"):
        (repo / file).parent.mkdir(parents=True, exist_ok=True)
        (repo / file).write_text("")
    shell(repo, "git", "add", "--force", ".")
    shell(repo, "git", "commit", "--quiet", "--message", "Two files")
    for file in ("data/reports/metrics.json", "dvc.lock"):
        (repo / file).write_text("{}")
    assert run_name(repo) == "Two files", "what a run writes is no change of it"
    (repo / "code.py").write_text("1")
    assert run_name(repo) == "Two files, uncommitted: code.py"
    (repo / "more.py").unlink()
    assert run_name(repo) == "Two files, uncommitted: code.py, +1"


def test_a_change_is_one_until_every_stage_has_seen_it(tmp_path: Path) -> None:
    """A run that broke off after ppo and is started again is the same run to people."""
    (tmp_path / "dvc.lock").write_text(LOCK.replace("kl_coef: 0.02", "kl_coef: 0.1", 1))
    (tmp_path / "params.yaml").write_text("ppo: {kl_coef: 0.1, updates: 8}")
    assert changed_params(tmp_path) == {"kl_coef": (0.02, 0.1)}


def test_a_run_without_git_is_named_by_the_time(tmp_path: Path) -> None:
    assert run_name(tmp_path).startswith("run of 20")


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) == ("none", True)
    shell(tmp_path, "git", "init", "--quiet")
    assert git_state(tmp_path) == ("none", True), "no commit yet"
    repo = tiny_repo(tmp_path / "repo")
    (repo / "untracked").write_text("x")
    commit, dirty = git_state(repo)
    assert (len(commit), dirty) == (40, False)
    (repo / ".dvcignore").write_text("changed")
    assert git_state(repo) == (commit, True)
