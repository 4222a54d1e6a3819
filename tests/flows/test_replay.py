"""Replay of what real stages made: the same bits, and where they are not, why and where."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from flows.prune import collect_garbage, prune_branches
from flows.replay import difference_of_files
from flows.workspace import open_workspace
from tasks.ancestry import Store, lineage, literal, recorded_in
from tasks.base import folder_sha256
from tasks.lineage import hash_path, load_stages
from tasks.stage import UserError
from tests.tiny import shell, tiny_model_dir, tiny_repo

# MLflow warns of its own code
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]ype hint:UserWarning")
ROOT = Path(__file__).parents[2]
OUT = "data/prepared"
# what later stages ask of few data and a small model
FEW: dict[str, dict[str, Any]] = {
    "demonstrate": {"prompts": 8},
    "sft": {"trainable_layers": 1, "validation_share": 0.3},
    "sample": {"prompts": 8},
    "rank": {"held_out_share": 0.4},
    "reward": {"trainable_layers": 1},
    "ppo": {"trainable_layers": 1, "eval_prompts": 4},
    "baseline": {"prompts": 4},
}
yaml = YAML()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model, tickets and prepared data, made by DVC from commits, and pushed; what was prepared is `policy/1`."""
    root = tmp_path_factory.mktemp("replay")
    model = tiny_model_dir(root / "model")
    folder = tiny_repo(root / "repo")
    for name in ("tasks", "dvc.yaml", "params.yaml", ".gitignore", ".dvcignore", "data/labels"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "data/raw").mkdir()
    (folder / "data/raw/.gitkeep").touch()
    params = yaml.load(folder / "params.yaml")
    params["base"].update(model=f"folder:{model}", sha256=folder_sha256(model), chat_template=None)
    params["text"].update(max_prompt_tokens=150, max_response_tokens=70)
    params["tickets"]["count"] = 80
    for section, values in FEW.items():
        params[section].update(values)
    yaml.dump(params, folder / "params.yaml")
    commit(folder, "Start")
    repro(folder)
    commit(folder, "Run")
    shell(folder, "dvc", "push", "--quiet")
    register(folder)
    return folder


def commit(folder: Path, message: str) -> None:
    shell(folder, "git", "add", ".")
    shell(folder, "git", "commit", "--quiet", "-m", message)


def environment(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    store = f"sqlite:///{folder / 'mlflow.db'}"
    return os.environ | {"PATH": path, "MLFLOW_TRACKING_URI": store, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}


def repro(folder: Path) -> None:
    for command in (["dvc", "repro", "prepare"], ["tasks.tracking", "replay"]):  # a slow machine may have missed some
        subprocess.run(
            [sys.executable, "-m", *command], cwd=folder, env=environment(folder), check=True, capture_output=True
        )


def client_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db", f"sqlite:///{folder}/mlflow.db")


def register(folder: Path) -> str:
    client = client_of(folder)
    if not client.search_registered_models():
        client.create_registered_model("policy")
    tags = {
        "dvc.path": OUT,
        "dvc.md5": hash_path(folder / OUT),
        "git.commit": shell(folder, "git", "rev-parse", "HEAD").strip(),
    }
    return str(client.create_model_version("policy", "file:///nowhere", tags=tags).version)


def replay(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flows.replay", *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == code, told
    assert "Traceback" not in told
    assert shell(folder, "git", "worktree", "list").count("\n") == 1
    assert "replay" not in shell(folder, "git", "branch", "--list")
    return told


def test_lineage_goes_back_by_hash(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    runs = lineage(client_of(repository), OUT, hash_path(repository / OUT), load_stages(repository), Store(repository))
    assert {run.stage for run in runs} == {"base", "tickets", "prepare"}
    assert runs[-1].stage == "prepare"
    made = {path: md5 for run in runs for path, md5 in run.outs.items()}
    raw = {"data/raw": hash_path(repository / "data/raw")}
    assert runs[-1].deps == {path: made[path] for path in ("data/models/base", "data/tickets")} | raw
    assert runs[-1].params["prepare.splits.sft"] == "0.3"
    assert runs[-1].environment["torch"] == torch.__version__.split("+")[0] or runs[-1].environment["torch"]


def test_the_same_to_the_bit(repository: Path) -> None:
    told = replay(repository, "policy/1")
    assert "10 of 10 outs are the same to the bit" in told
    rows = [line for line in told.splitlines() if "│" in line and "data/" in line]
    assert len(rows) == 10
    assert all(" yes " in row for row in rows)
    assert "environment" in told


def test_one_stage_alone_on_its_recorded_inputs(repository: Path) -> None:
    told = replay(repository, "policy/1", "--only", "prepare")
    assert "7 of 7 outs are the same to the bit" in told
    assert "tickets as run" not in told


def test_what_ran_beside_uncommitted_changes_gets_its_recorded_parameters(repository: Path) -> None:
    params = repository / "params.yaml"
    original = params.read_text()
    params.write_text(original.replace("{sft: 0.3, reward: 0.3,", "{sft: 0.2, reward: 0.4,"))
    assert params.read_text() != original
    repro(repository)
    version = register(repository)
    shell(repository, "dvc", "push", "--quiet")
    shell(repository, "git", "checkout", "--quiet", ".")
    shell(repository, "dvc", "checkout", "--quiet", "--force", "--allow-missing")
    told = replay(repository, f"policy/{version}", "--only", "prepare")
    assert not shell(repository, "git", "log", "--all", "--oneline", "--", "data/models/base"), "no weights in git"
    assert "`prepare` ran beside uncommitted changes" in told
    assert "parameters from the record, not from the commit: prepare.splits.reward=0.4, prepare.splits.sft=0.2" in told


def test_a_difference_is_found_and_shown(repository: Path) -> None:
    """A stage whose code has become another behind the record's back."""
    file = repository / "tasks/prepare/card.py"
    original = file.read_text()
    file.write_text(original.replace('"failed_checks": len(found.failed_checks)', '"failed_checks": 7'))
    assert file.read_text() != original
    commit(repository, "Other code")
    other = shell(repository, "git", "rev-parse", "HEAD").strip()
    client = client_of(repository)
    run = next(run for run in client.search_runs(["1"], "tags.`dvc.stage` = 'prepare'") if not recorded_in(run).dirty)
    right = run.data.tags["git.commit"]
    client.set_tag(run.info.run_id, "git.commit", other)
    try:
        told = replay(repository, "policy/1", "--only", "prepare", code=1)
    finally:
        client.set_tag(run.info.run_id, "git.commit", right)
        file.write_text(original)
        commit(repository, "The code again")
    assert "6 of 7 outs are the same to the bit" in told
    assert '"failed_checks": 0' in told
    assert '"failed_checks": 7' in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["policy/99"], "has no policy/99"),
        (["policy/1", "--only", "ppo"], "`ppo` is none of the stages that made it: base, tickets, prepare"),
    ],
)
def test_mistakes_are_told(repository: Path, arguments: list[str], told: str) -> None:
    said = replay(repository, *arguments, code=2)
    assert told in said or "`ppo` is none of the stages that made it: tickets, base, prepare" in said


def test_garbage_collection_keeps_what_a_registered_version_was_made_of(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its branch is gone, the workspace has other data by now, and the cache is all that there is."""
    from tasks.registered_model import fetch

    repository = shutil.copytree(repository, tmp_path / "repo", symlinks=True)  # the other tests need theirs
    monkeypatch.chdir(repository)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{repository / 'mlflow.db'}")
    lost = repository / "data/lost.txt"
    lost.write_text("nobody needs this")
    shell(repository, "dvc", "add", "--quiet", "data/lost.txt")
    lost_md5 = hash_path(lost)
    for file in (lost, repository / "data/lost.txt.dvc"):
        file.unlink()
    start = shell(repository, "git", "rev-list", "--max-parents=0", "HEAD").strip()
    with open_workspace("old", start, str(repository)) as workspace:  # a run branch without a registered version
        workspace.remove()
    assert prune_branches(repository, keep=0) == ["runs/old"]

    before = hash_path(repository / OUT)
    with open_workspace("busy", repository=str(repository)) as workspace:
        with pytest.raises(Exception, match="the workspace busy is in use"):
            collect_garbage(repository)
        workspace.remove()
    # a commit without any data, so that branch and workspace need nothing
    shell(repository, "git", "switch", "--quiet", "--discard-changes", "--orphan", "empty")
    shell(repository, "git", "commit", "--quiet", "--allow-empty", "-m", "Empty")
    for branch in shell(repository, "git", "for-each-ref", "--format=%(refname:short)", "refs/heads").split():
        if branch != "empty":
            shell(repository, "git", "branch", "-D", branch)
    shutil.rmtree(repository / "data", ignore_errors=True)
    (repository / ".dvc/config").write_text("")
    client = client_of(repository)
    run = next(run for run in client.search_runs(["1"], "tags.`dvc.stage` = 'tickets'"))
    client.set_tag(run.info.run_id, "dvc.stage", "lost")
    cached = sorted((repository / ".dvc/cache/files").rglob("*"))
    with pytest.raises(UserError, match="has no finished run of `tickets`"):
        collect_garbage(repository)
    assert sorted((repository / ".dvc/cache/files").rglob("*")) == cached, "with a gap in the record nothing goes"
    client.set_tag(run.info.run_id, "dvc.stage", "tickets")
    assert collect_garbage(repository) >= 3
    kept = shell(repository, "git", "rev-list", "rlhf/registered").split()
    assert run.data.tags["git.commit"] in kept, "the commits stay, too, for a replay"

    cache = repository / ".dvc/cache"
    assert not (cache / "files/md5" / lost_md5[:2] / lost_md5[2:]).exists()
    target = tmp_path / "loaded"
    target.mkdir()
    fetch(before, OUT, [{"url": str(cache), "options": {}}], target)
    assert hash_path(target) == before


def test_where_two_files_differ(tmp_path: Path) -> None:
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("same\none\n")
    new.write_text("same\nother\n")
    assert difference_of_files(old, new) == "line 2: one then, other now"
    new.write_text("same\none\nmore\n")
    assert difference_of_files(old, new) == "2 lines then, 3 now"

    tensors = {"a": torch.zeros(3), "b": torch.tensor([1.0, 2.0]), "c": torch.zeros(1)}
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_file(tensors, one)
    save_file(tensors | {"b": torch.tensor([1.0, 2.25])}, other)
    assert difference_of_files(one, other) == "b by up to 0.25; 1 of 3 tensors differ"
    save_file(tensors | {"b": torch.zeros(3)}, other)
    assert difference_of_files(one, other) == "b: not in both, or of another shape"
    assert load_file(one).keys() == tensors.keys()


def test_recorded_values_become_values_again() -> None:
    assert [literal(text) for text in ("0.02", "8", "None", "True", "[0.9, 0.95]", "all", "k1")] == [
        *(0.02, 8, None, True, [0.9, 0.95], "all", "k1"),
    ]
    assert json.dumps(literal("1e-05")) == "1e-05"
