"""Workspaces: apart from each other, with one cache, and the repository as it was."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.workspace import Workspace, absent_within, open_workspace
from tasks.conversations import single
from tasks.lineage import hash_path
from tasks.stage import UserError
from tests.judged import wrote
from tests.tiny import shell, tiny_repo

DVC_YAML = """
stages:
  double:
    cmd: python double.py
    deps: [double.py, data/raw/in.txt]
    params: [double]
    outs: [data/out.txt]
    metrics: [{data/reports/double.json: {cache: false}}]
"""
DOUBLE = """
from pathlib import Path
times = int(Path("params.yaml").read_text().split("times:")[1])
text = Path("data/raw/in.txt").read_text() * times
Path("data/reports").mkdir(exist_ok=True)
Path("data/reports/double.json").write_text('{"length": %d}' % len(text))
Path("data/out.txt").write_text(text)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with data in DVC, its cache and its remote, and one stage that has not run."""
    folder = tiny_repo(tmp_path / "repo")
    (folder / "data/raw").mkdir(parents=True)
    (folder / "data/raw/in.txt").write_text("ab")
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "double.py").write_text(DOUBLE)
    (folder / "params.yaml").write_text("# kept\ndouble:\n  times: 2\n")
    (folder / ".gitignore").write_text("/.rlhf/\n")
    shell(folder, "dvc", "add", "--quiet", "data/raw/in.txt")
    shell(folder, "git", "add", ".")
    shell(folder, "git", "commit", "--quiet", "-m", "All")
    shell(folder, "dvc", "push", "--quiet")
    return folder


def state(repository: Path) -> list[str]:
    """Everything of the repository that a run could disturb."""
    return [
        shell(repository, "git", "rev-parse", "HEAD", "--abbrev-ref", "HEAD"),
        shell(repository, "git", "status", "--porcelain"),
        shell(repository, "git", "stash", "list"),
        (repository / "params.yaml").read_text(),
        ",".join(sorted(file.name for file in repository.iterdir() if file.name != ".rlhf")),
    ]


def run(workspace: Workspace) -> None:
    shell(workspace.path, "dvc", "repro", "--quiet", "--pull", "--allow-missing")


def test_a_run_leaves_a_branch_and_nothing_else(repository: Path, tmp_path: Path) -> None:
    before = state(repository)
    with open_workspace("one", repository=str(repository)) as workspace:
        assert not (workspace.path / "data/raw/in.txt").exists()  # nothing is pulled before it is needed
        workspace.set_params({"double.times": 3})
        run(workspace)
        assert (workspace.path / "data/out.txt").read_text() == "ababab"
        assert workspace.push() == []
        commit = workspace.commit("Run one")
        workspace.publish()
        workspace.remove()
    assert state(repository) == before
    assert shell(repository, "git", "worktree", "list").count("\n") == 1
    assert shell(repository, "git", "rev-parse", "runs/one").strip() == commit
    names = shell(repository, "git", "diff", "--name-only", "HEAD", "runs/one").split()
    assert names == ["data/.gitignore", "data/reports/double.json", "dvc.lock", "params.yaml"]
    assert shell(repository, "git", "show", "runs/one:params.yaml") == "# kept\ndouble:\n  times: 3\n"
    lock = YAML(typ="safe").load(shell(repository, "git", "show", "runs/one:dvc.lock"))
    md5 = lock["stages"]["double"]["outs"][0]["md5"]
    assert (tmp_path / "repo-remote/files/md5" / md5[:2] / md5[2:]).read_text() == "ababab"
    assert list((tmp_path / "repo-remote/runs").rglob("*")), "the run cache is on the remote"


def test_what_one_run_made_another_finds(repository: Path) -> None:
    for name in ("one", "two"):
        with open_workspace(name, repository=str(repository)) as workspace:
            told = shell(workspace.path, "dvc", "repro", "--pull", "--allow-missing")
            assert ("is cached - skipping run" in told) == (name == "two")
            workspace.remove()


def test_nothing_is_fetched_for_what_is_up_to_date(repository: Path) -> None:
    with open_workspace("one", repository=str(repository)) as workspace:
        run(workspace)
        workspace.commit("Run one")
        workspace.remove()
    with open_workspace("two", "runs/one", str(repository)) as workspace:
        told = shell(workspace.path, "dvc", "repro", "--pull", "--allow-missing")
        assert "Data and pipelines are up to date" in told
        assert not (workspace.path / "data/raw/in.txt").exists()


def test_what_dvc_keeps_in_a_folder_that_a_stage_reads_is_fetched(repository: Path) -> None:
    """DVC alone would take the folder, which is there, for one that has changed, and run the stage without its data."""
    (repository / "dvc.yaml").write_text(DVC_YAML.replace("data/raw/in.txt", "data/raw"))
    shell(repository, "git", "commit", "--quiet", "--all", "-m", "Reads the folder")
    for name, revision, told in (("one", "HEAD", "Running stage"), ("two", "runs/one", "are up to date")):
        with open_workspace(name, revision, str(repository)) as workspace:
            assert absent_within(workspace.path, ["data/raw", "double.py"]) == ["data/raw/in.txt.dvc"]
            workspace.fetch_within(["data/raw", "double.py"])
            assert absent_within(workspace.path, ["data/raw"]) == []
            assert told in shell(workspace.path, "dvc", "repro", "--pull", "--allow-missing")
            workspace.commit(f"Run {name}")
            workspace.remove()


def test_two_at_once_do_not_touch_each_other(repository: Path) -> None:
    found: dict[str, str] = {}

    def work(name: str, times: int) -> None:
        with open_workspace(name, repository=str(repository)) as workspace:
            workspace.set_params({"double.times": times})
            run(workspace)
            workspace.push()
            workspace.commit(f"Run {name}")
            found[name] = (workspace.path / "data/out.txt").read_text()
            workspace.remove()

    before = state(repository)
    threads = [threading.Thread(target=work, args=(f"run{times}", times)) for times in (2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"run2": "ab" * 2, "run5": "ab" * 5}
    assert state(repository) == before


def test_the_same_workspace_is_not_had_twice_and_comes_back_as_it_was(repository: Path) -> None:
    with open_workspace("one", repository=str(repository)) as workspace:
        (workspace.path / "left.txt").write_text("here")
        with (
            pytest.raises(UserError, match="the workspace one is in use by another process"),
            open_workspace("one", repository=str(repository)),
        ):
            pass
    with open_workspace("one", repository=str(repository)) as workspace:
        assert (workspace.path / "left.txt").read_text() == "here"


def test_a_new_workspace_takes_over_the_checkpoints_of_dead_runs(repository: Path) -> None:
    checkpoint = Path(".rlhf/checkpoints/ppo/0123456789abcdef/step-000002/weights")
    code = (
        "import os, signal, sys; from flows.workspace import open_workspace\n"
        f"with open_workspace('killed', repository={str(repository)!r}) as workspace:\n"
        f"    file = workspace.path / {str(checkpoint)!r}\n"
        "    file.parent.mkdir(parents=True); file.write_text('half way')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    with open_workspace("alive", repository=str(repository)) as alive:
        (alive.path / checkpoint).parent.rename(alive.path / checkpoint.parent.parent / "step-000004")
        with open_workspace("other", repository=str(repository)) as other:
            steps = (other.path / checkpoint.parent.parent).iterdir()
            assert [step.name for step in steps] == ["step-000002"], "the living keep theirs"
    with open_workspace("next", repository=str(repository)) as workspace:
        assert (workspace.path / checkpoint.parent.parent / "step-000004/weights").read_text() == "half way"
        workspace.remove()
    with open_workspace("alive", repository=str(repository)) as alive:
        found = alive.path / checkpoint.parent.parent / "step-000004/weights"
        assert found.read_text() == "half way", "it may be tried again"
    with open_workspace("replay", repository=str(repository), adopt=False) as workspace:
        assert not (workspace.path / ".rlhf/checkpoints").exists()


def test_an_address_is_cloned_and_the_branch_pushed_back(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare.git"
    shell(tmp_path, "git", "clone", "--quiet", "--bare", str(repository), str(bare))
    home = tmp_path / "worker"
    home.mkdir()
    monkeypatch.setattr("flows.workspace._HOME", home)
    with open_workspace("one", repository=f"file://{bare}") as workspace:
        run(workspace)
        workspace.push()
        commit = workspace.commit("Run one")
        workspace.publish()
        workspace.remove()
    assert shell(bare, "git", "rev-parse", "runs/one").strip() == commit


def test_a_clone_whose_results_would_go_with_it_is_refused(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell(repository, "dvc", "remote", "modify", "--quiet", "local", "url", ".remote")
    shell(repository, "git", "commit", "--quiet", "-am", "A remote within")
    monkeypatch.setattr("flows.workspace._HOME", tmp_path)
    with (
        pytest.raises(UserError, match=r"the DVC remote `local` of .* is a folder within the clone"),
        open_workspace("one", repository=f"file://{repository}"),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"id": "a/b"}, "`a/b` cannot name a workspace"),
        ({"id": "x", "revision": "nowhere"}, "has no commit `nowhere`"),
        ({"id": "x", "repository": "https://ann:token@example.com/r.git"}, "address has a password in it"),
    ],
)
def test_mistakes_are_told(repository: Path, arguments: dict[str, str], told: str) -> None:
    where = {"repository": str(repository)} | arguments
    with pytest.raises(UserError, match=told), open_workspace(**where):  # type: ignore[arg-type]  # none is `adopt`
        pass


def test_an_unknown_parameter_is_told(repository: Path) -> None:
    with open_workspace("one", repository=str(repository)) as workspace:
        with pytest.raises(UserError, match=r"no key `double\.time`; did you mean `double\.times`\?"):
            workspace.set_params({"double.time": 3})
        with pytest.raises(UserError, match=r"params\.yaml has no key `triple\.times`"):
            workspace.set_params({"triple.times": 3})


def line_of(number: int, response: str = "fine") -> str:
    """A demonstration as the page appends it."""
    return json.dumps(wrote(single(f"prompt {number}"), "ann", response).model_dump(), ensure_ascii=False) + "\n"


def test_labels_that_people_gave_at_home_are_taken_once_whole_and_in_their_order(repository: Path) -> None:
    file = repository / "data/labels/demonstrations.jsonl"
    file.parent.mkdir()
    file.write_text(line_of(1))
    shell(repository, "git", "add", ".")
    shell(repository, "git", "commit", "--quiet", "-m", "Labels")
    separator = "\u2028"  # ends a line for Python's text, and not for JSON Lines
    last = line_of(4)
    file.write_text(line_of(1) + line_of(2, f"a{separator}b") + line_of(3) + last[:40])
    before = state(repository)
    with open_workspace("labels", repository=str(repository)) as workspace:
        assert workspace.take_labels() == 2
        whole = file.read_bytes().removesuffix(last[:40].encode())
        assert (workspace.path / "data/labels/demonstrations.jsonl").read_bytes() == whole
        assert shell(workspace.path, "git", "status", "--porcelain") == ""
        assert shell(workspace.path, "git", "log", "-1", "--format=%s") == "Labels: 2 judgments\n"
        assert workspace.take_labels() == 0
        assert shell(workspace.path, "git", "log", "-1", "--format=%s") == "Labels: 2 judgments\n"
        with file.open("a") as end:
            end.write(last[40:] + "{}\n")
        with pytest.raises(UserError, match=r"demonstrations\.jsonl has a damaged line: .* begins with '{}'"):
            workspace.take_labels()
        assert (workspace.path / "data/labels/demonstrations.jsonl").read_bytes() == whole
        file.write_bytes(file.read_bytes().removesuffix(b"{}\n"))
        assert workspace.take_labels() == 1
    assert state(repository) == before


def test_labels_in_dvc_are_taken_and_its_cache_stays_as_it_is(repository: Path) -> None:
    file = repository / "data/labels/demonstrations.jsonl"
    file.parent.mkdir()
    file.write_text(line_of(1))
    shell(repository, "dvc", "add", "--quiet", str(file))
    shell(repository, "git", "add", ".")
    shell(repository, "git", "commit", "--quiet", "-m", "Labels")
    shell(repository, "dvc", "push", "--quiet")
    md5 = hash_path(file)
    file.unlink()  # it may be a link into the cache
    file.write_text(line_of(1) + line_of(2))
    with open_workspace("labels", repository=str(repository)) as workspace:
        assert workspace.take_labels() == 1
        assert hash_path(workspace.path / "data/labels/demonstrations.jsonl") == hash_path(file)
        assert hash_path(file) in shell(workspace.path, "git", "show", "HEAD:data/labels/demonstrations.jsonl.dvc")
        assert shell(workspace.path, "dvc", "status", "--json", "data/labels/demonstrations.jsonl.dvc") == "{}\n"
    assert (repository / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}").read_text() == line_of(1)
