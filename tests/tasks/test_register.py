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
from unittest.mock import Mock

import pytest

from tasks import registry
from tasks.conversations import Conversation
from tasks.datasets import SideBySide, write_rows
from tasks.lineage import hash_path, load_stages
from tasks.params import load_params
from tasks.register import against, run
from tasks.stage import Stage
from tasks.tracking import Tracker
from tasks.verdict import in_markdown
from tests.tiny import CONVERSATION, shell, tiny_model_dir, tiny_repo

ROOT = Path(__file__).parents[2]
IMPORTS_PYFUNC = pytest.mark.filterwarnings("ignore:.*[Tt]ype hint:UserWarning")  # MLflow warns of its own code
RESPONSES = ["we are sorry", "dear customer will"]
MODELS = ("sft", "reward", "policy")
EVALUATION: dict[str, Any] = {
    "prompts": 40,
    "gold": {"base": 0.3, "sft": 0.5, "policy": 0.75, "gain": 0.25, "prompts": 40},
    "score": {"base": -3.0, "sft": 0.5, "policy": 2.0, "gain": 1.5},
    "overrated": 0.05,
    "win_rate": 0.8,
    "win_rate_low": 0.7,
    "kl": 3.5,
    "fluency": {"base": -3.0, "sft": -2.5, "policy": -2.4},
    "length": {"base": 50.0, "sft": 40.0, "policy": 38.0},
    "ended": {"base": 0.2, "sft": 0.8, "policy": 1.0},
    "repetition": {"base": 0.0, "sft": 0.02, "policy": 0.03},
    "relevance": {"base": 0.1, "sft": 0.5, "policy": 0.6},
    "score_win_rate": 0.85,
    "score_win_rate_low": 0.78,
    "overoptimisation": {"kept_update": 8, "gold_peak_update": 6.0, "turned_down": 1.0},
}
REPORTS = {
    "prepare": {"prepare": {"failed_checks": 0}},
    "demonstrate": {"demonstrate": {"count": 12, "by_people": 2, "by_simulated": 10}},
    "rank": {"rank": {"rankings": 10, "by_people": 10, "by_simulated": 0}},
    "reward": {"reward": {"accuracy": 0.8, "calibration_error": 0.05}},
    "ppo": {"ppo": {"kept_update": 8, "updates": 8, "stopped_early": 0}},
    "evaluation": EVALUATION,
    "judge": {"judge": {"used": 0}},
}
BY_GOLD = ("gold", "win_rate", "win_rate_low", "overrated")
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


def write_reports(folder: Path, gold: float | None = 0.75, score: float = 1.0, **evaluation: Any) -> None:
    """The reports that gates read, and 40 answers to held-out prompts with their scores, put into DVC's cache."""
    figures = EVALUATION | evaluation
    if gold is None:
        figures = {name: figure for name, figure in figures.items() if name not in BY_GOLD}
        figures["overoptimisation"] = {"kept_update": 8}
    reports = REPORTS | {"evaluation": figures}
    for name, report in reports.items():
        file = folder / f"data/reports/{name}/metrics.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report))
    rows = []
    for n in range(40):
        marks = {"score.policy": score + n} | ({} if gold is None else {"gold.policy": gold + 0.001 * n})
        rows.append(SideBySide(prompt=f"p{n}", base="a", sft="b", policy="c", scores=marks))
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
    registered: dict[str, Any] = json.loads((repo / "data/reports/registered.json").read_text(encoding="utf-8"))
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
    registered = json.loads((repo / "data/reports/registered.json").read_text(encoding="utf-8"))
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


def test_the_run_and_the_version_say_what_happened(repo: Path) -> None:
    client = client_of(repo)
    version = client.get_model_version("policy", "1")
    run = client.get_run(version.run_id)
    note = run.data.tags["mlflow.note.content"]
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).data.tags["mlflow.note.content"] == note
    told = json.loads((repo / "data/reports/registered.json").read_text(encoding="utf-8"))["verdict"]
    assert (told["policy"], told["outcome"], told["champion"], told["rival"]) == (
        "policy/1",
        "promoted",
        "policy/1",
        "",
    )
    assert (told["gates_passed"], told["gates_failed"], told["gates_open"]) == (12, [], [])
    verdict, _, happened = note.partition("\n\n- **Policy against")
    assert verdict == in_markdown(told)
    lines = f"- **Policy against{happened}".splitlines()
    assert len(lines) == 5
    assert lines[0] == (
        "- **Policy against SFT**: win rate 80% by the gold score on 40 prompts; its gold gained 0.25: 0.75 (SFT 0.5)."
    )
    assert "KL 3.5 nats an answer; length 38 (SFT 40) tokens" in lines[1]
    assert "80% of held-out pairs as the labelers did; their noise allows not measured" in lines[2]
    assert lines[3] == "- **Labels**: 12 demonstrations: 2 by people, 10 simulated; 10 rankings, all by people."
    assert lines[4].endswith("update 8 of 8 is kept; gold was highest after update 6 and has come down since.")
    assert all(line in version.description for line in lines)


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
    config.write_text(config.read_text(encoding="utf-8").rstrip() + "\n" + more)


def test_the_champion_moves_through_gates_alone(repo: Path) -> None:
    """One after another, as in a team's life."""
    # 1. the first of all has no rival, and passed
    first = policy_of(repo, "champion")
    assert str(first.version) == "1"
    assert first.tags["gates.passed"] == "true"
    assert first.tags["gates.rival"] == ""
    assert first.tags["gate.reward_accuracy"] == "0.8, at least 0.65 asked: passed"
    assert first.tags["champion.author"] == "gates"
    assert "- win_rate_low: 0.7 by the gold score on 40 prompts, at least 0.55 asked: passed" in first.description
    assert {str(client_of(repo).get_model_version_by_alias(name, "champion").version) for name in MODELS} == {"1"}

    # 2. another policy, no better than the champion on the same prompts
    change_policy(repo, "\n")
    registered = register(repo)
    assert registered["policy"]["version"] == "2"
    assert registered["champion"] == "refused: champion_win_rate_low"
    duel = registered["against_champion"]
    assert (duel["version"], duel["prompts"], duel["win"], duel["tie"], duel["loss"]) == ("1", 40, 0.0, 1.0, 0.0)
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
    assert (
        champion.tags["gate.champion_win_rate_low"] == "1 by the gold score on 40 prompts, at least 0.51 asked: passed"
    )
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
    params.write_text(params.read_text(encoding="utf-8").replace("approval: false", "approval: true"))
    registered = register(repo)
    assert registered["champion"] == "waits for approval"
    assert str(policy_of(repo, "champion").version) == "2"

    # 8. a person has said no: that stands, with approval and without
    registry.decline(client_of(repo), registered["policy"]["version"], author="ann", reason="rude")
    assert register(repo)["champion"].startswith("declined: rude (ann, ")
    params.write_text(params.read_text(encoding="utf-8").replace("approval: true", "approval: false"))
    assert register(repo)["champion"].startswith("declined: rude (ann, ")

    # 9. likewise a rollback: the next run does not undo it
    change_policy(repo, "\n")
    write_reports(repo, gold=0.95)
    assert register(repo)["champion"] == "promoted"
    registry.rollback(client_of(repo), author="ann", reason="too long")
    assert str(policy_of(repo, "champion").version) == "1"
    assert register(repo)["champion"].startswith("rolled back: too long (ann, ")
    assert str(policy_of(repo, "champion").version) == "1"

    # 10. answers of the champion that are damaged cannot be compared with: that is not measured, and a person decides
    rival = policy_of(repo, "champion").tags["evaluation.samples"]
    for stored in repo.parent.rglob(f"files/md5/{rival[:2]}/{rival[2:]}"):
        content = stored.read_bytes()
        stored.unlink()
        stored.write_bytes(content + b" ")
    change_policy(repo, "\n\n\n")
    registered = register(repo)
    assert registered["champion"] == "waits for approval"
    assert registered["gates"]["champion_win_rate_low"]["open"].startswith("the answers of policy/1 cannot be had: ")
    assert registered["verdict"]["gates_open"] == ["champion_win_rate_low"]
    assert f"make promote VERSION=policy/{registered['policy']['version']}" in str(registered["verdict"]["next"])

    # as the tests below expect it
    params.write_text(params.read_text(encoding="utf-8").replace("approval: true", "approval: false"))
    change_policy(repo, "")
    write_reports(repo)
    assert register(repo)["policy"]["version"] == "1"


def test_without_a_gold_score_a_person_decides_what_nobody_could_judge(repo: Path, tmp_path: Path) -> None:
    """In a life of its own: the repository of a team whose prompts have no tickets."""
    own = tmp_path / "own"
    shutil.copytree(repo, own, symlinks=True)
    (own / "mlflow.db").unlink()

    # 1. the first: the reward model alone finds it better than the SFT model, and nobody can say whether it is fooled
    write_reports(own, gold=None)
    done = run_register(own)
    assert done.returncode == 0, done.stderr
    itself = "the reward model (which proves little: the policy was trained to please it) on 40 prompts"
    assert f"gate win_rate_low: 0.78 by {itself}, at least 0.55 asked: passed" in done.stdout
    assert "gate reward_hacking: not measured (there is neither a gold score nor a judge" in done.stdout
    assert "policy/1: waits for approval" in done.stdout
    told = json.loads((own / "data/reports/registered.json").read_text(encoding="utf-8"))["verdict"]
    assert {"command": 'make promote VERSION=policy/1 REASON="..."', "what": "make it the champion"} in told["next"]
    client = client_of(own)
    version = policy_of(own, "candidate")
    assert registry.champion(client) is None
    assert (version.tags["gates.failed"], version.tags["gates.open"]) == ("", "reward_hacking")
    assert registry.through_gates(version) == "not measured: reward_hacking"
    assert version.description.startswith("1 could not be measured.")
    run = client.get_run(version.run_id)
    note = run.data.tags["mlflow.note.content"]
    assert f"win rate 85% by {itself}; its score gained 1.5: 2 (SFT 0.5). There is no gold score: these prompts" in note
    assert "update 8 of 8 is kept; gold was not measured on the way." in note
    assert "gate/reward_hacking" not in run.data.metrics
    assert "nan" not in note.lower()

    # 2. a judge can say
    verdicts = {"pairs": 30, "win_rate": 0.75, "win_rate_low": 0.6, "win_rate_high": 0.9}
    (own / "data/reports/judge/metrics.json").write_text(
        json.dumps({"judge": {"used": 1, "versus": {"sft": verdicts, "base": {"pairs": 0}}}})
    )
    registered = register(own)
    assert registered["champion"] == "promoted"
    assert registered["gates"]["win_rate_low"] == {
        **{"value": 0.6, "at_least": 0.55, "passed": True, "by": "the judge on 30 prompts"}
    }
    assert registered["gates"]["reward_hacking"]["value"] == pytest.approx(0.1)

    # 3. another policy of the same reward model is held against the champion by that
    judge = (own / "data/reports/judge/metrics.json").read_text(encoding="utf-8")
    change_policy(own, "\n")
    write_reports(own, gold=None, score=0.5)
    (own / "data/reports/judge/metrics.json").write_text(judge)
    registered = register(own)
    assert registered["champion"] == "refused: champion_win_rate_low"
    assert registered["against_champion"]["by"] == itself
    assert registered["against_champion"]["loss"] == 1.0

    # 4. with another reward model there is no common measure
    config = own / "data/models/reward/config.json"
    shell(own, "dvc", "unprotect", "data/models/reward")
    config.write_text(config.read_text(encoding="utf-8") + "\n")
    registered = register(own)
    assert registered["champion"] == "waits for approval"
    assert registered["gates"]["champion_win_rate_low"]["value"] is None
    assert registered["against_champion"] == {
        **{"version": "1", "open": "no gold score, and policy/1 was scored by another reward model"}
    }


@IMPORTS_PYFUNC
@pytest.mark.parametrize(("golden", "win_rate", "same"), [(20, 1.0, False), (19, 0.0, True), (19, None, False)])
def test_a_few_gold_scores_do_not_decide_between_two_policies(
    monkeypatch: pytest.MonkeyPatch, golden: int, win_rate: float | None, same: bool
) -> None:
    """Gold finds the policy better on each of 40 prompts that has it, the reward model finds it worse everywhere."""

    def answers(gold: float, score: float) -> list[SideBySide]:
        scores = [{"score.policy": score} | ({"gold.policy": gold} if n < golden else {}) for n in range(40)]
        return [SideBySide(prompt=f"p{n}", base="", sft="", policy="", scores=marks) for n, marks in enumerate(scores)]

    def fetch(_md5: str, _path: str, _stores: object, file: Path) -> None:
        write_rows(file, answers(gold=0.2, score=1.0))

    monkeypatch.setattr("tasks.registered_model.fetch_object", fetch)
    rival = Mock(version="1", tags={})
    found = against(rival, answers(gold=0.8, score=0.0), [], seed=1, same_reward_model=same)
    assert found.get("win_rate") == win_rate
    few = "the gold score has 19 of the 20 prompts that it needs"
    itself = "the reward model (which proves little: the policy was trained to please it) on 40 prompts"
    assert (found.get("by"), found.get("open")) == {
        1.0: ("the gold score on 20 prompts", None),
        0.0: (f"{itself} ({few})", None),
        None: (None, f"{few}, and policy/1 was scored by another reward model"),
    }[win_rate]


@IMPORTS_PYFUNC
def test_a_champion_that_answered_other_prompts_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(prompt: str) -> list[SideBySide]:
        return [SideBySide(prompt=prompt, base="", sft="", policy="", scores={"score.policy": 0.0})]

    monkeypatch.setattr("tasks.registered_model.fetch_object", lambda *given: write_rows(given[3], answers("a ticket")))
    found = against(Mock(version="1", tags={}), answers("an own prompt"), [], seed=1, same_reward_model=True)
    assert found == {"open": "policy/1 answered none of these prompts, so the two cannot be compared"}


@IMPORTS_PYFUNC
def test_a_run_that_registers_nothing_has_gates_and_a_verdict(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that PPO brought nothing to: no win rate is shown of a model over itself."""
    own = tmp_path / "own"
    shutil.copytree(repo, own, symlinks=True)
    (own / "mlflow.db").unlink()
    write_reports(own, win_rate=0.5, win_rate_low=0.5)
    (own / "data/reports/ppo/metrics.json").write_text(
        json.dumps({"ppo": {"kept_update": 0, "updates": 2, "stopped_early": 0}})
    )
    params = load_params(ROOT / "params.yaml")
    off = params.model_copy(update={"register_": params.register_.model_copy(update={"enabled": False})})
    monkeypatch.chdir(own)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{own}/mlflow.db")
    events: list[Any] = []
    stage = Stage(load_stages()["register"], off, Tracker.in_memory(events), root=own)
    run(stage)
    stage.commit()
    assert client_of(own).search_registered_models() == []
    registered = json.loads((own / "data/reports/registered.json").read_text(encoding="utf-8"))
    told = registered["verdict"]
    assert registered["champion"] == told["outcome"] == "not registered: register.enabled is false"
    assert set(registered["policy"]) == {"md5"}
    assert (told["policy"], told["champion"], told["gates_failed"]) == ("", "", ["win_rate_low"])
    assert (told["nothing_gained"], told["kept_update"], "win_rate" in told) == (True, 0, False)
    (note,) = (event["text"] for event in events if event["kind"] == "note")
    assert "50" not in note.partition("win_rate_low")[0]
    assert "**Policy against SFT**: the policy is the SFT model." in note


def test_loads_by_alias_from_another_process_and_folder(repo: Path, tmp_path: Path) -> None:
    code = (
        "policy = mlflow.pyfunc.load_model('models:/policy@candidate')\n"
        "reward = mlflow.pyfunc.load_model('models:/reward@candidate')\n"
        "prompts = ['your order is late', 'hello']\n"
        "pairs = pandas.DataFrame({'prompt': prompts, 'response': ['we are sorry', 'dear customer will']})\n"
        "print(json.dumps([policy.predict(prompts), policy.predict(pairs[['prompt']]), reward.predict(pairs)]))\n"
        f"talk = {CONVERSATION}\n"
        "table = pandas.DataFrame({'prompt': [talk, 'hello'], 'response': ['we are sorry'] * 2})\n"
        "print(json.dumps([policy.predict([talk, 'hello']), policy.predict(talk), policy.predict(table[['prompt']]),\n"
        "                  reward.predict(table)]))\n"
        "reward.predict(prompts)\n"
    )
    done = elsewhere(repo, tmp_path, code)
    assert "must be a DataFrame with the columns prompt, response" in done.stderr
    of_texts, of_conversations = map(json.loads, done.stdout.splitlines())
    replies, same_replies, scores = of_texts
    prompts = ["your order is late", "hello"]
    assert replies == same_replies == [greedy_reply(repo / "data/models/policy", prompt) for prompt in prompts]
    assert scores == pytest.approx(
        [score(repo / "data/models/reward", *pair) for pair in zip(prompts, RESPONSES, strict=True)],
        abs=1e-5,
    )

    both, alone, in_table, scores = of_conversations
    assert both == in_table == [greedy_reply(repo / "data/models/policy", prompt) for prompt in (CONVERSATION, "hello")]
    assert alone == both[:1]
    assert scores == pytest.approx(
        [score(repo / "data/models/reward", prompt, "we are sorry") for prompt in (CONVERSATION, "hello")], abs=1e-5
    )


def greedy_reply(folder: Path, prompt: str | Conversation) -> str:
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


def score(folder: Path, prompt: str | Conversation, response: str) -> float:
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
    listing = json.loads((cache / md5[:2] / md5[2:]).read_text(encoding="utf-8"))
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
    assert time.monotonic() - started < 120
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
