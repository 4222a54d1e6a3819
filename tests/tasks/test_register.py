"""Registered models: no weights in MLflow, the same hash is the same version, damage is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks import registry
from tasks.datasets import SideBySide
from tasks.lineage import hash_path
from tests.tiny import shell, tiny_model_dir, tiny_repo

ROOT = Path(__file__).parents[2]
IMPORTS_PYFUNC = pytest.mark.filterwarnings("ignore:.*[Tt]ype hint:UserWarning")  # MLflow warns of its own code
RESPONSES = ["we are sorry", "dear customer will"]
MODELS = ("sft", "reward", "policy")
EVALUATION: dict[str, Any] = {
    "gold": {"base": 0.3, "sft": 0.5, "policy": 0.75, "gain": 0.25},
    "win_rate": 0.8,
    "win_rate_low": 0.7,
    "kl": 3.5,
    "fluency": {"base": -3.0, "sft": -2.5, "policy": -2.4},
    "length": {"base": 50.0, "sft": 40.0, "policy": 38.0},
    "ended": {"base": 0.2, "sft": 0.8, "policy": 1.0},
}
REPORTS = {
    "prepare": {"prepare": {"failed_checks": 0}},
    "reward": {"reward": {"accuracy": 0.8, "calibration_error": 0.05}},
    "evaluation": EVALUATION,
}
SAMPLES = "data/reports/evaluation/samples.jsonl"


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with three tiny models in DVC's cache and on its remote, registered."""
    folder = tiny_repo(tmp_path_factory.mktemp("register") / "repo")
    for seed, name in enumerate(MODELS):
        tiny_model_dir(folder / "data/models" / name, reward=name == "reward", seed=seed)
    shell(folder, "dvc", "add", "--quiet", *(f"data/models/{name}" for name in MODELS))
    shell(folder, "dvc", "push", "--quiet")
    write_reports(folder)
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / file, folder)
    register(folder)
    return folder


def write_reports(folder: Path, gold: float = 0.75, **evaluation: Any) -> None:
    """The reports that gates read, and 40 answers to held-out prompts with a gold score, put into DVC's cache."""
    reports = REPORTS | {"evaluation": EVALUATION | evaluation}
    for name, report in reports.items():
        file = folder / f"data/reports/{name}/metrics.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report))
    rows = [
        SideBySide(prompt=f"p{n}", base="a", sft="b", policy="c", scores={"gold.policy": gold + 0.001 * n})
        for n in range(40)
    ]
    (folder / SAMPLES).write_text("".join(row.model_dump_json() + "\n" for row in rows))
    md5 = hash_path(folder / SAMPLES)  # as DVC would; it refuses here, where models are `.dvc` files and stages' outs
    cached = folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    cached.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / SAMPLES, cached)


def run_register(repo: Path, uri: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
    return subprocess.run(
        [sys.executable, "-m", "tasks.run", "register"],
        cwd=repo,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def register(repo: Path) -> dict[str, Any]:
    done = run_register(repo)
    assert done.returncode == 0, done.stderr
    registered: dict[str, Any] = json.loads((repo / "data/reports/registered.json").read_text())
    return registered


def client_of(repo: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{repo}/mlflow.db", f"sqlite:///{repo}/mlflow.db")


def elsewhere(repo: Path, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in another process and folder that know nothing of this project but MLflow's address."""
    folder.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{repo}/mlflow.db"
    return subprocess.run(
        [sys.executable, "-c", "import json, mlflow, pandas\n" + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_versions_bear_hash_alias_and_figures(repo: Path) -> None:
    client = client_of(repo)
    registered = json.loads((repo / "data/reports/registered.json").read_text())
    for name in MODELS:
        md5 = hash_path(repo / "data/models" / name)
        assert registered[name] == {"version": "1", "md5": md5}
        model = client.get_model_version_by_alias(name, "candidate")
        assert model.tags["dvc.md5"] == md5
        assert model.tags["evaluation.gold.gain"] == "0.25"
        assert model.tags["evaluation.win_rate"] == "0.8"
        assert len(model.tags["git.commit"]) == 40
        assert client.get_run(model.run_id).data.tags["pipeline.id"] == model.tags["pipeline.id"]
        assert client.get_run(model.run_id).info.run_name == "register"


def test_no_weights_are_copied(repo: Path) -> None:
    stored = [file for file in (repo / "mlartifacts").rglob("*") if file.is_file()]
    assert not [file for file in stored if file.suffix == ".safetensors"]
    assert sum(file.stat().st_size for file in stored) < 3 * 50_000


def test_the_same_hash_is_the_same_version(repo: Path) -> None:
    before = (repo / "data/reports/registered.json").read_bytes()
    register(repo)
    assert (repo / "data/reports/registered.json").read_bytes() == before
    assert len(client_of(repo).search_model_versions("name = 'policy'")) == 1


def policy_of(repo: Path, alias: str) -> Any:
    return client_of(repo).get_model_version_by_alias("policy", alias)


def change_policy(repo: Path, more: str) -> None:
    """The first policy with more white space at the end of a file: another to the hash, the same to a reader."""
    config = repo / "data/models/policy/config.json"
    shell(repo, "dvc", "unprotect", "data/models/policy")
    config.write_text(config.read_text().rstrip() + "\n" + more)


def test_the_champion_moves_through_gates_alone(repo: Path) -> None:
    """One after another, as in a team's life."""
    # 1. the first of all has no rival, and passed
    first = policy_of(repo, "champion")
    assert str(first.version) == "1"
    assert first.tags["gates.passed"] == "true"
    assert first.tags["gates.rival"] == ""
    assert first.tags["gate.reward_accuracy"] == "0.8, at least 0.65 asked: passed"
    assert first.tags["champion.author"] == "gates"
    assert "- win_rate_low: 0.7, at least 0.55 asked: passed" in first.description
    assert {str(client_of(repo).get_model_version_by_alias(name, "champion").version) for name in MODELS} == {"1"}

    # 2. another policy, no better than the champion on the same prompts
    change_policy(repo, "\n")
    registered = register(repo)
    assert registered["policy"]["version"] == "2"
    assert registered["champion"] == "refused: champion_win_rate_low"
    assert str(policy_of(repo, "candidate").version) == "2"
    assert str(policy_of(repo, "champion").version) == "1"
    refused = policy_of(repo, "candidate")
    assert refused.tags["gates.failed"] == "champion_win_rate_low"
    assert "held against: policy/1" in refused.description

    # 3. the same policy with better answers to more than half of the prompts
    write_reports(repo, gold=0.95)
    assert register(repo)["champion"] == "promoted"
    champion = policy_of(repo, "champion")
    assert str(champion.version) == "2"
    assert champion.tags["champion.replaced"] == "1"
    assert champion.tags["gate.champion_win_rate_low"] == "1, at least 0.51 asked: passed"
    assert str(client_of(repo).get_model_version_by_alias("sft", "champion").version) == "1"

    # 4. again: the same file, held against the same rival
    before = (repo / "data/reports/registered.json").read_bytes()
    register(repo)
    assert (repo / "data/reports/registered.json").read_bytes() == before

    # 5. the old one comes back as a candidate, and no further
    change_policy(repo, "")
    write_reports(repo)
    registered = register(repo)
    assert registered["policy"]["version"] == "1"
    assert registered["champion"] == "refused: champion_win_rate_low"
    assert str(policy_of(repo, "candidate").version) == "1"
    assert str(policy_of(repo, "champion").version) == "2"

    # 6. a missed gate says by how much
    write_reports(repo, kl=45.5)
    register(repo)
    assert policy_of(repo, "candidate").tags["gate.kl"] == "45.5, at most 40 asked: failed by 5.5"

    # 7. with approval a person has the last word
    change_policy(repo, "\n\n")
    write_reports(repo, gold=0.99)
    params = repo / "params.yaml"
    params.write_text(params.read_text().replace("approval: false", "approval: true"))
    registered = register(repo)
    assert registered["champion"] == "waits for approval"
    assert str(policy_of(repo, "champion").version) == "2"

    # 8. a person has said no: that stands, with approval and without
    registry.decline(client_of(repo), registered["policy"]["version"], author="ann", reason="rude")
    assert register(repo)["champion"].startswith("declined: rude (ann, ")
    params.write_text(params.read_text().replace("approval: true", "approval: false"))
    assert register(repo)["champion"].startswith("declined: rude (ann, ")

    # 9. likewise a rollback: the next run does not undo it
    change_policy(repo, "\n")
    write_reports(repo, gold=0.95)
    assert register(repo)["champion"] == "promoted"
    registry.rollback(client_of(repo), author="ann", reason="too long")
    assert str(policy_of(repo, "champion").version) == "1"
    assert register(repo)["champion"].startswith("rolled back: too long (ann, ")
    assert str(policy_of(repo, "champion").version) == "1"

    # 10. answers of the champion that are damaged cannot be compared with: its gate does not hold
    rival = policy_of(repo, "champion").tags["evaluation.samples"]
    for stored in repo.parent.rglob(f"files/md5/{rival[:2]}/{rival[2:]}"):
        content = stored.read_bytes()
        stored.unlink()
        stored.write_bytes(content + b" ")
    assert register(repo)["champion"] == "refused: champion_win_rate_low"

    # as the tests below expect it
    params.write_text(params.read_text().replace("approval: true", "approval: false"))
    change_policy(repo, "")
    write_reports(repo)
    assert register(repo)["policy"]["version"] == "1"


def test_loads_by_alias_from_another_process_and_folder(repo: Path, tmp_path: Path) -> None:
    code = (
        "policy = mlflow.pyfunc.load_model('models:/policy@candidate')\n"
        "reward = mlflow.pyfunc.load_model('models:/reward@candidate')\n"
        "prompts = ['your order is late', 'hello']\n"
        "pairs = pandas.DataFrame({'prompt': prompts, 'response': ['we are sorry', 'dear customer will']})\n"
        "print(json.dumps([policy.predict(prompts), policy.predict(pairs[['prompt']]), reward.predict(pairs)]))\n"
        "reward.predict(prompts)\n"
    )
    done = elsewhere(repo, tmp_path, code)
    assert "must be a DataFrame with the columns prompt, response" in done.stderr
    replies, same_replies, scores = json.loads(done.stdout)
    prompts = ["your order is late", "hello"]
    assert replies == same_replies == [greedy_reply(repo / "data/models/policy", prompt) for prompt in prompts]
    assert scores == pytest.approx(
        [score(repo / "data/models/reward", *pair) for pair in zip(prompts, RESPONSES, strict=True)],
        abs=1e-5,
    )


def greedy_reply(folder: Path, prompt: str) -> str:
    """One prompt, one token after another, without padding."""
    import torch

    from tasks.models import decode_response, encode_prompt, load_language_model, load_tokenizer

    model, tokenizer = load_language_model(folder), load_tokenizer(folder)
    ids = encode_prompt(tokenizer, prompt)
    start = len(ids)
    with torch.inference_mode():
        while len(ids) < start + 64 and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    reply = decode_response(tokenizer, ids[start:])
    assert reply, "the test needs a model that says something"
    return reply


def score(folder: Path, prompt: str, response: str) -> float:
    import torch

    from tasks.models import encode_prompt, encode_response, load_scalar_model, load_tokenizer

    model, tokenizer = load_scalar_model(folder), load_tokenizer(folder)
    ids = encode_prompt(tokenizer, prompt) + encode_response(tokenizer, response)
    with torch.inference_mode():
        return float(model(torch.tensor([ids])).logits[0, 0]) - 0.25  # tiny_model_dir's bias


@IMPORTS_PYFUNC
def test_falls_back_to_the_remote_and_refuses_damage(repo: Path, tmp_path: Path) -> None:
    from tasks.register import dvc_stores
    from tasks.registered_model import fetch

    md5 = hash_path(repo / "data/models/sft")
    stores = dvc_stores(repo)
    cache, remote = (Path(store["url"]) / "files/md5" for store in stores)
    listing = json.loads((cache / md5[:2] / md5[2:]).read_text())
    weights = next(entry["md5"] for entry in listing if entry["relpath"] == "model.safetensors")

    def fetched(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        fetch(md5, "data/models/sft", stores, folder)
        return folder

    def damage(store: Path, name: str) -> None:
        file = store / name[:2] / name[2:]
        content = file.read_bytes()
        file.unlink()  # it may be a hard link
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    assert hash_path(fetched("from cache")) == md5
    shutil.move(cache, tmp_path / "hidden")
    assert hash_path(fetched("from remote")) == md5

    damage(remote, weights)
    with pytest.raises(OSError, match=r"data/models/sft/model\.safetensors is damaged"):
        fetched("damaged weights")
    damage(remote, md5)
    with pytest.raises(OSError, match="data/models/sft is damaged"):
        fetched("damaged listing")
    shutil.rmtree(remote)
    with pytest.raises(FileNotFoundError, match="was not found in any place"):
        fetched("nothing left")
    shutil.move(tmp_path / "hidden", cache)
    damage(cache, weights)
    with pytest.raises(OSError, match="is damaged"):
        fetched("damaged cache")


def test_without_mlflow_it_cannot_work_and_says_so_soon(repo: Path) -> None:
    report = repo / "data/reports/registered.json"
    report.unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    done = run_register(repo, f"http://user:secret@127.0.0.1:{port}")
    assert time.monotonic() - started < 30
    assert done.returncode == 2
    assert "error: stage `register`: MLflow at http://***@127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert not report.exists()
    assert not list(report.parent.glob(".tmp-*"))


@IMPORTS_PYFUNC
def test_a_listing_may_not_name_files_outside_its_folder(tmp_path: Path) -> None:
    from tasks.registered_model import fetch

    listing = json.dumps([{"md5": "0" * 32, "relpath": "../outside"}]).encode()
    digest = hashlib.md5(listing, usedforsecurity=False).hexdigest()
    place = tmp_path / "store/files/md5" / digest[:2] / f"{digest[2:]}.dir"
    place.parent.mkdir(parents=True)
    place.write_bytes(listing)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ValueError, match="outside its folder"):
        fetch(f"{digest}.dir", "data/models/x", [{"url": str(tmp_path / "store"), "options": {}}], target)
    assert not (tmp_path / "outside").exists()
