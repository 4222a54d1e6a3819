"""A conversation with a tiny model: streamed, with history, within the context."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.chat import Chat, load, main
from tasks.models import load_language_model, load_tokenizer
from tasks.stage import UserError
from tests.tiny import tiny_model_dir

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("chat") / "model", seed=1)


@pytest.fixture
def chat(folder: Path) -> Chat:
    return Chat(load_language_model(folder), load_tokenizer(folder), 12, temperature=0)


def greedy(chat: Chat, history: list[dict[str, str]]) -> str:
    """The whole answer at once, as transformers gives it."""
    text = chat.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    batch = chat.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids = chat.model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch.input_ids.shape[1] :]
    answer: str = chat.tokenizer.decode(ids, skip_special_tokens=True)
    return answer


def test_answers_come_in_pieces_and_join_the_history(chat: Chat) -> None:
    expected = greedy(chat, [{"role": "user", "content": "hello"}])
    pieces = list(chat.say("hello"))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == expected.strip()
    second = [*chat.history, {"role": "user", "content": "and my order"}]
    assert "".join(chat.say("and my order")).strip() == greedy(chat, second).strip()
    assert [turn["role"] for turn in chat.history] == ["user", "assistant"] * 2


def test_an_answer_that_is_cut_short_is_kept_as_far_as_it_came(chat: Chat) -> None:
    pieces = chat.say("hello")
    first = next(pieces)
    pieces.close()
    assert chat.history[-1] == {"role": "assistant", "content": first.strip()}


def test_the_oldest_turns_make_room(chat: Chat) -> None:
    chat.model.config.max_position_embeddings = 80
    for word in ("late", "refund", "monday", "ticket"):
        list(chat.say(word))
    assert chat.history[0]["content"] != "late"
    assert chat.history[-2]["content"] == "ticket"
    with pytest.raises(UserError, match="tokens, and the model takes 68"):
        list(chat.say("customer " * 90))
    assert chat.history[-2]["content"] == "ticket", "what was said before stays"


def test_a_model_that_fails_is_told(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    list(chat.say("hello"))
    before = list(chat.history)

    def fail(**_: Any) -> None:
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    monkeypatch.setattr(chat.model, "generate", fail)
    with pytest.raises(UserError, match="the model gave no answer: RuntimeError: probability tensor"):
        list(chat.say("and my order"))
    assert chat.history == before


@pytest.mark.parametrize("option", [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--temperature", "nan"]])
def test_options_out_of_range_are_told(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["data/models/sft", *option])
    assert f"error: {option[0]} must be" in capsys.readouterr().err


def test_in_the_terminal(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tasks.chat", str(folder), "--max-new-tokens", "5", "--temperature", "0"],
        cwd=ROOT,
        input="hello\\\nyour order\n/new\nhello\\\nyour order\n/quit\n",
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [line.partition("model> ")[2] for line in done.stdout.splitlines() if "model> " in line]
    assert len(answers) == 2
    assert answers[0] == answers[1] != ""


@pytest.mark.filterwarnings("ignore:.*[Tt]ype hint:UserWarning")  # MLflow warns of its own code
def test_what_cannot_be_talked_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is no model folder"):
        load(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(UserError, match="models:/policy@champion from MLflow"):
        load("models:/policy@champion")


@pytest.mark.filterwarnings("ignore:.*[Tt]ype hint:UserWarning")  # MLflow warns of its own code
def test_a_registered_version(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Through MLflow, with what `register` stores."""
    import mlflow

    from tasks import registered_model
    from tasks.lineage import hash_path
    from tests.tiny import shell, tiny_repo

    repo = tiny_repo(tmp_path / "repo")
    shell(repo, "cp", "-r", str(folder), "model")
    shell(repo, "dvc", "add", "--quiet", "model")
    store = {"url": str(repo / ".dvc/cache"), "options": {}}
    config = {"kind": "language", "path": "model", "md5": hash_path(folder), "stores": [store]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.pyfunc.save_model(
        str(tmp_path / "saved"),
        python_model=registered_model.__file__,
        model_config=config | {"max_new_tokens": 7, "batch_size": 1},
        pip_requirements=[],
    )
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.create_registered_model("policy")
    client.create_model_version("policy", str(tmp_path / "saved"))
    client.set_registered_model_alias("policy", "champion", "1")
    model, tokenizer, limit = load("models:/policy@champion")
    assert limit == 7
    assert "".join(Chat(model, tokenizer, limit, 0).say("hello"))
