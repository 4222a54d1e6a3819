"""Which labels made a policy, counted by hand; what is lost is named, and the working folder is not believed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from tasks.ancestry import Recorded, Store
from tasks.conversations import single
from tasks.datasets import Demonstration, Ranking, Row, Samples, Vote, prompt_id, write_rows
from tasks.labels.judgments import JudgedRanking, WrittenDemonstration, item_id
from tasks.labels.provenance import (
    Content,
    Count,
    Provenance,
    judged_rankings,
    main,
    provenance,
    shown,
    written_demonstrations,
)
from tasks.lineage import hash_path
from tests.tiny import shell, tiny_repo

# MLflow warns of its own code
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]ype hint:UserWarning")
ROOT = Path(__file__).parents[3]
WRITTEN, JUDGED, VOTES = (f"data/labels/{name}.jsonl" for name in ("demonstrations", "rankings", "arena"))
OUTPUTS = {"one": ["a", "b"], "two": ["a", "b", "c"], "three": ["a", "b"]}
TIMES = {"guidelines": "g", "started_at": "2026-01-01T00:00:00+00:00", "ended_at": "2026-01-01T00:01:00+00:00"}


def wrote(labeler: str, prompt: str, response: str | None) -> WrittenDemonstration:
    return WrittenDemonstration(
        item=item_id(single(prompt)),
        prompt=single(prompt),
        labeler=labeler,
        response=response,
        skipped=None if response else "too hard",
        **TIMES,
    )


def judged(labeler: str, prompt: str, ranks: list[int], outputs: list[str] | None = None) -> JudgedRanking:
    outputs = outputs or OUTPUTS[prompt]
    ended = [True] * len(outputs)
    return JudgedRanking(
        item=item_id(single(prompt), outputs, ended),
        prompt=single(prompt),
        labeler=labeler,
        responses=outputs,
        ended=ended,
        order=list(range(len(outputs))),
        seed=1,
        ranks=ranks,
        flags=[[] for _ in ranks],
        ratings=[None] * len(ranks),
        skipped=None if ranks else "no difference",
        **TIMES,
    )


def ranking(labeler: str, prompt: str, ranks: list[int], *, held_out: bool = False) -> Ranking:
    outputs = OUTPUTS.get(prompt, ["x", "y"])
    return Ranking(
        id=prompt_id(single(prompt)),
        prompt=single(prompt),
        responses=outputs,
        ranks=ranks,
        labeler=labeler,
        ended=[True] * len(outputs),
        held_out=held_out,
    )


VOTE = Vote(**ranking("dee", "voted", [1, 2]).model_dump(), models=["policy/1", "sft"], seed=3, shown_at="2026-01-01")
CLEO = Vote(
    **ranking("cleo", "voted too", [2, 1]).model_dump(), models=["policy/1", "sft"], seed=4, shown_at="2026-01-01"
)
DEMONSTRATIONS = [
    Demonstration(id=prompt_id(single(prompt)), prompt=single(prompt), response=text, labeler=labeler)
    for prompt, text, labeler in (("p", "good", "ann"), ("q", "fine", "bo"), ("r", "made up", "simulated:ada"))
]
WROTE = [
    *(wrote("ann", "p", "bad"), wrote("ann", "p", "good"), wrote("ann", "q", None)),  # the second in place of the first
    *(wrote("bo", "q", "fine"), wrote("bo", "elsewhere", "of another run"), wrote("eve", "p", "left out")),
]
RANKED = [
    *(judged("ann", "one", [2, 1]), judged("ann", "one", [1, 2]), judged("ann", "two", [1, 2, 2])),
    *(judged("ann", "three", []), judged("ann", "one", [1, 2], ["of", "older samples"])),
    *(judged("bo", "one", [1, 1]), judged("bo", "two", [1, 2, 3]), judged("cleo", "one", [1, 1])),
]
RANKINGS = [
    *(ranking("ann", "one", [1, 2]), ranking("ann", "two", [1, 2, 2], held_out=True)),
    *(ranking("simulated:ada", "three", [1, 2]), ranking("dee", "voted", [1, 2])),  # the last is the vote
]
SAMPLES = [
    Samples(id=prompt_id(single(prompt)), prompt=single(prompt), responses=outputs, ended=[True] * len(outputs))
    for prompt, outputs in OUTPUTS.items()
]
SETTINGS = {
    "demonstrate": {"demonstrate.labeler": "human", "demonstrate.human.leave_out": "['eve']"},
    "rank": {
        "rank.labeler": "human",
        "rank.human.leave_out": "['bo']",
        "rank.human.held_out_labelers": "['cleo']",
    },
}
OF_DEMONSTRATIONS = [
    Count("demonstrate", "human", "ann", WRITTEN, used=1, superseded=1, skipped=1),
    Count("demonstrate", "human", "bo", WRITTEN, used=1, other=1),
    Count("demonstrate", "human", "eve", WRITTEN, used=0, left_out=1),
    Count("demonstrate", "simulated", "simulated:ada", "stage demonstrate", used=1),
]
OF_RANKINGS = [
    Count("rank", "human", "cleo", VOTES, used=1, held_out=1),
    Count("rank", "human", "dee", VOTES, used=1, held_out=0),
    Count("rank", "human", "ann", JUDGED, used=2, held_out=1, superseded=1, skipped=1, other=1),
    Count("rank", "human", "bo", JUDGED, used=0, held_out=0, left_out=2),
    Count("rank", "human", "cleo", JUDGED, used=1, held_out=1),
    Count("rank", "simulated", "simulated:ada", "stage rank", used=1, held_out=0),
]


def lines(path: Path, rows: Sequence[Row]) -> str:
    write_rows(path, rows)
    return hash_path(path)


def keep(folder: Path, path: str) -> str:
    """As DVC keeps an out: its content in the cache, by hash. Gives the hash."""
    cache = folder / ".dvc/cache/files/md5"

    def put(content: bytes, end: str = "") -> str:
        md5 = hashlib.md5(content).hexdigest()
        (cache / md5[:2]).mkdir(parents=True, exist_ok=True)
        (cache / md5[:2] / f"{md5[2:]}{end}").write_bytes(content)
        return md5 + end

    place = folder / path
    files = sorted(file for file in place.rglob("*") if file.is_file())
    listing = [{"md5": put(file.read_bytes()), "relpath": str(file.relative_to(place))} for file in files]
    return put(json.dumps(listing, sort_keys=True).encode(), ".dir")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository where policy/1 was made, as the stages leave it: data, hashes and records."""
    folder = tiny_repo(tmp_path_factory.mktemp("provenance") / "repo")
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copy(ROOT / ".gitignore", folder)
    (folder / "data/raw").mkdir(parents=True)
    (folder / "data/raw/notes.txt").write_text("raw\n")
    labels: dict[str, Sequence[Row]] = {WRITTEN: WROTE, JUDGED: RANKED, VOTES: [VOTE, CLEO]}
    hashes = {path: lines(folder / path, rows) for path, rows in labels.items()}
    shell(folder, "git", "add", ".")
    shell(folder, "git", "commit", "--quiet", "-m", "Labels")
    hashes["data/raw"] = hash_path(folder / "data/raw")
    lines(folder / "data/collected/demonstrations/demonstrations.jsonl", DEMONSTRATIONS)
    lines(folder / "data/collected/samples/samples.jsonl", SAMPLES)
    lines(folder / "data/collected/rankings/rankings.jsonl", RANKINGS)
    apart = [ranking("cleo", "one", [1, 1]), ranking("cleo", "voted too", [2, 1])]
    lines(folder / "data/collected/rankings/held_out_labelers.jsonl", apart)
    for name in ("prepared", "models/sft", "models/reward", "models/policy"):
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "content").write_text(name)
    outs = ("prepared", "collected/demonstrations", "models/sft", "collected/samples", "collected/rankings")
    for name in (*outs, "models/reward", "models/policy"):
        hashes[f"data/{name}"] = keep(folder, f"data/{name}")
    record(folder, hashes)
    return folder


def record(folder: Path, hashes: dict[str, str]) -> None:
    """What the tracker leaves in MLflow."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri, uri)
    commit = shell(folder, "git", "rev-parse", "HEAD").strip()
    experiment = client.create_experiment("rlhf", artifact_location=f"file://{folder}/artifacts")
    stages = {
        "prepare": (["data/raw"], ["data/prepared"]),
        "demonstrate": ([WRITTEN], ["data/collected/demonstrations"]),
        "sft": (["data/collected/demonstrations"], ["data/models/sft"]),
        "sample": (["data/models/sft"], ["data/collected/samples"]),
        "rank": (["data/collected/samples", JUDGED, VOTES], ["data/collected/rankings"]),
        "reward": (["data/models/sft", "data/collected/rankings"], ["data/models/reward"]),
        "ppo": (["data/models/sft", "data/models/reward"], ["data/models/policy"]),
    }
    for stage, (deps, outs) in stages.items():
        tags = {"dvc.stage": stage, "git.commit": commit, "git.dirty": str(stage == "sft").lower()}
        tags |= {f"dvc.dep.{path}": hashes[path] for path in deps} | {f"dvc.out.{path}": hashes[path] for path in outs}
        run = client.create_run(experiment, tags=tags).info.run_id
        for key, value in SETTINGS.get(stage, {}).items():
            client.log_param(run, key, value)
        client.set_terminated(run, "FINISHED")
    for name in ("sft", "reward", "policy"):
        client.create_registered_model(name)
        tags = {"dvc.path": f"data/models/{name}", "dvc.md5": hashes[f"data/models/{name}"], "git.commit": commit}
        client.create_model_version(name, "file:///nowhere", tags=tags)
        client.set_registered_model_alias(name, "candidate", "1")


@pytest.fixture
def repository(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage."""
    folder = tmp_path / "repo"
    shutil.copytree(original, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    return folder


def forget(folder: Path, md5: str) -> None:
    (folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()


def of_job(found: Provenance, job: str) -> list[Count]:
    return [one for one in found.labels if one.job == job]


def test_every_line_of_the_label_files_is_counted_once(repository: Path) -> None:
    found = provenance("models:/policy@candidate")
    assert found.labels == OF_DEMONSTRATIONS + OF_RANKINGS
    assert found.lost == []
    of_people = [one for one in found.labels if one.source in (WRITTEN, JUDGED)]
    told = sum(
        (one.used or 0) + (one.superseded or 0) + (one.skipped or 0) + (one.left_out or 0) + (one.other or 0)
        for one in of_people
    )
    assert told == len(WROTE) + len(RANKED)


def test_files_samples_models_and_commits(repository: Path) -> None:
    found = provenance("policy/1")
    assert (found.version, found.aliases, found.path) == ("policy/1", ["candidate"], "data/models/policy")
    assert [stage.stage for stage in found.stages] == ["demonstrate", "sft", "sample", "rank", "reward", "ppo"]
    assert {stage.stage: stage.versions for stage in found.stages if stage.versions} == {
        name: {f"data/models/{model}": f"{model}/1"}
        for name, model in (("sft", "sft"), ("reward", "reward"), ("ppo", "policy"))
    }
    assert [stage.stage for stage in found.stages if stage.dirty] == ["sft"]
    commit = shell(repository, "git", "rev-parse", "HEAD").strip()
    assert {stage.commit for stage in found.stages} == {commit}
    assert found.samples == {
        "path": "data/collected/samples",
        "md5": hash_path(repository / "data/collected/samples"),
        "prompts": 3,
        "outputs": 7,
    }
    assert [(file.path, file.md5, file.holds) for file in found.files] == [
        (VOTES, hash_path(repository / VOTES), "2 lines"),
        (WRITTEN, hash_path(repository / WRITTEN), "6 lines"),
        (JUDGED, hash_path(repository / JUDGED), "8 lines"),
    ]
    assert found.settings["rank.human.held_out_labelers"] == "['cleo']"


def test_an_sft_model_needs_no_rankings(repository: Path) -> None:
    found = provenance("sft/1")
    assert found.labels == OF_DEMONSTRATIONS
    assert [stage.stage for stage in found.stages] == ["demonstrate", "sft"]
    assert not found.samples


def test_the_folder_of_today_is_not_believed(repository: Path) -> None:
    """It has other labels and other samples by now; git and the cache have those of then."""
    for path in (WRITTEN, JUDGED):
        (repository / path).write_text("")
    lines(repository / "data/collected/samples/samples.jsonl", SAMPLES[:1])
    assert provenance("policy/1").labels == OF_DEMONSTRATIONS + OF_RANKINGS


def test_labels_that_no_commit_has_are_found_in_what_they_grew_into(repository: Path) -> None:
    """An append-only file begins as it was then; one that was edited does not."""
    shell(repository, "git", "checkout", "--quiet", "--orphan", "other")
    shell(repository, "git", "rm", "--quiet", "-r", "--cached", "data/labels")
    shell(repository, "git", "commit", "--quiet", "-m", "Without labels")
    branches = shell(repository, "git", "for-each-ref", "--format=%(refname:short)", "refs/heads").split()
    for branch in branches:
        if branch != "other":
            shell(repository, "git", "branch", "-D", branch)
    shell(repository, "git", "reflog", "expire", "--expire=now", "--all")
    shell(repository, "git", "gc", "--quiet", "--prune=now")
    with (repository / JUDGED).open("a") as file:
        file.write(judged("zoe", "one", [1, 2]).model_dump_json() + "\n")
    text = (repository / WRITTEN).read_text()
    (repository / WRITTEN).write_text(text.replace("too hard", "too long"))
    found = provenance("policy/1")
    assert of_job(found, "rank") == OF_RANKINGS
    unknown = [None] * 4
    # of the demonstrations there is what the stage made of them
    assert of_job(found, "demonstrate") == [
        Count("demonstrate", "human", "ann", WRITTEN, 1, None, *unknown),
        Count("demonstrate", "human", "bo", WRITTEN, 1, None, *unknown),
        Count("demonstrate", "simulated", "simulated:ada", "stage demonstrate", 1),
    ]
    assert any("is not in this clone" in line for line in found.lost)
    assert any(line.startswith(WRITTEN) for line in found.lost)


def test_samples_that_are_lost_leave_the_rest(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    md5 = hash_path(repository / "data/collected/samples")
    forget(repository, md5)
    found = provenance("policy/1")
    ann = next(one for one in of_job(found, "rank") if one.labeler == "ann")
    assert (ann.used, ann.held_out, ann.superseded, ann.skipped, ann.other) == (None, None, 1, 1, None)
    assert of_job(found, "demonstrate") == OF_DEMONSTRATIONS
    assert found.samples == {"path": "data/collected/samples", "md5": md5, "prompts": None, "outputs": None}
    assert len([line for line in found.lost if md5 in line]) == 1
    assert main(["policy/1"]) == 0
    assert "not to be had any more: data/collected/samples" in capsys.readouterr().out


def test_damaged_content_is_refused_and_named(repository: Path) -> None:
    file = repository / "data/collected/demonstrations/demonstrations.jsonl"
    md5 = hash_path(file)
    (repository / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).write_text(file.read_text().replace("good", "evil"))
    shutil.rmtree(file.parent)  # else what lies there would do, for its hash is the same
    found = provenance("policy/1")
    assert [one.used for one in of_job(found, "demonstrate")] == [None, None, None]
    assert [one.left_out for one in of_job(found, "demonstrate")] == [0, 0, 1]
    assert any("demonstrations.jsonl is damaged" in line for line in found.lost)
    assert of_job(found, "rank") == OF_RANKINGS


def test_a_gap_in_the_record_is_named_and_the_rest_told(repository: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{repository}/mlflow.db", f"sqlite:///{repository}/mlflow.db")
    run = next(iter(client.search_runs(["1"], "tags.`dvc.stage` = 'rank'")))
    client.delete_run(run.info.run_id)
    found = provenance("policy/1")
    assert found.labels == OF_DEMONSTRATIONS
    assert any("no finished run of `rank`" in line for line in found.lost)
    assert "rank" not in [stage.stage for stage in found.stages]


def test_in_a_fresh_clone_with_a_remote(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote = tmp_path / "remote"
    shutil.copytree(repository / ".dvc/cache/files", remote / "files")
    clone = tmp_path / "clone"
    shell(tmp_path, "git", "clone", "--quiet", str(repository), str(clone))
    shell(clone, "dvc", "remote", "add", "--quiet", "--force", "--default", "local", str(remote))
    done = subprocess.run(
        [sys.executable, "-m", "tasks.lineage", "models:/policy@candidate", "--json"],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [Count(**one) for one in told["labels"]] == OF_DEMONSTRATIONS + OF_RANKINGS
    assert told["lost"] == []


def test_what_is_shown(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models:/policy@candidate"]) == 0
    told = capsys.readouterr().out
    assert "policy/1 (candidate): data/models/policy" in told
    assert "demonstrate took 2 by 2 human labelers, 1 by 1 simulated labeler" in told
    assert "rank took 5 by 3 human labelers, 1 by 1 simulated labeler" in told
    assert "7 outputs to 3 prompts" in told
    assert "+ uncommitted changes" in told
    assert hash_path(repository / JUDGED) in told
    assert "not to be had" not in told


def test_a_name_is_no_markup() -> None:
    count = Count("rank", "human", "[/b]", JUDGED, 1)
    found = Provenance("policy/1", [], "data/models/policy", "0" * 32, "0" * 40, labels=[count])
    console = Console(width=160, record=True)
    shown(found, console)
    assert "[/b]" in console.export_text()


def recorded(store: Store, stage: str, labeler: str, outs: dict[str, str], deps: dict[str, str]) -> Recorded:
    params = {f"{stage}.labeler": labeler}
    return Recorded(stage, "run", "commit", False, deps, outs, params, {})


@pytest.mark.parametrize("labeler", ["simulated", "recorded"])
def test_other_labelers_are_never_taken_for_people(repository: Path, labeler: str) -> None:
    """With people's judgments there, which nobody asked for."""
    store = Store(repository)
    outs = {path: hash_path(repository / path) for path in ("data/collected/rankings", "data/collected/demonstrations")}
    deps = {path: hash_path(repository / path) for path in (WRITTEN, JUDGED, VOTES)}
    content = Content(store, [])
    ranked = judged_rankings(recorded(store, "rank", labeler, outs, deps), content)
    assert {(one.kind, one.labeler): one.used for one in ranked if one.used} == {
        ("human", "dee"): 1,
        ("human", "cleo"): 1,
        (labeler, "ann"): 2,
        (labeler, "cleo"): 1,
        (labeler, "simulated:ada"): 1,
    }
    assert {one.labeler: one.other for one in ranked if one.source == JUDGED} == {"ann": 3, "bo": 2, "cleo": 1}
    written = written_demonstrations(recorded(store, "demonstrate", labeler, outs, deps), content)
    assert {one.labeler: one.used for one in written if one.kind == labeler} == {"ann": 1, "bo": 1, "simulated:ada": 1}
    assert all(one.used == 0 for one in written if one.kind == "human")
    assert content.lost == []


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("policy/99", "has no policy/99"),
        ("policy@champion", "no version of the policy has the alias `champion`"),
        ("reward@champion", "no version of the reward model has the alias `champion`"),
        ("value/1", "`value/1` is no version of a model"),
        ("policy", "`policy` is no version of a model"),
    ],
)
def test_mistakes_are_told(repository: Path, version: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([version]) == 2
    assert told in capsys.readouterr().err


def test_without_mlflow(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{repository}/nowhere.db")
    assert main(["policy/1"]) == 2
    assert "there is no MLflow at sqlite:///" in capsys.readouterr().err
    assert not (repository / "nowhere.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["policy/1"]) == 2
    assert "MLflow at http://127.0.0.1:9" in capsys.readouterr().err


def test_a_version_without_a_record(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{repository}/mlflow.db", f"sqlite:///{repository}/mlflow.db")
    tags = {"dvc.path": "data/models/policy", "dvc.md5": "0" * 32, "git.commit": ""}
    client.create_model_version("policy", "file:///nowhere", tags=tags)
    client.create_model_version("policy", "file:///nowhere")
    assert main(["policy/2"]) == 2
    assert "has no finished run of `ppo`" in capsys.readouterr().err
    assert main(["policy/3"]) == 2
    assert "this pipeline did not register it" in capsys.readouterr().err
