"""A conversation with a tiny model: streamed, with history, within the context; another model can go on with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import chat as chat_module
from tasks.chat import Chat, Loaded, default_model, load, main, pinned, switch
from tasks.conversations import Conversation, single
from tasks.models import load_language_model, load_tokenizer
from tasks.stage import UserError
from tests.tiny import CONVERSATION, tiny_model_dir

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("chat") / "model", seed=1)


@pytest.fixture
def chat(folder: Path) -> Chat:
    return Chat(load_language_model(folder), load_tokenizer(folder), 12, temperature=0)


def greedy(chat: Chat, history: Conversation) -> str:
    """The whole answer at once, as transformers gives it."""
    text = chat.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    batch = chat.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids = chat.model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch.input_ids.shape[1] :]
    answer: str = chat.tokenizer.decode(ids, skip_special_tokens=True)
    return answer


def test_answers_come_in_pieces_and_join_the_history(chat: Chat) -> None:
    expected = greedy(chat, single("hello"))
    pieces = list(chat.say("hello"))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == expected.strip()
    second = [*chat.history, *single("and my order")]
    assert "".join(chat.say("and my order")).strip() == greedy(chat, second).strip()
    assert [turn["role"] for turn in chat.history] == ["user", "assistant"] * 2


def test_it_answers_a_conversation_and_goes_on(chat: Chat) -> None:
    assert "".join(chat.reply(CONVERSATION)).strip() == greedy(chat, CONVERSATION).strip()
    assert chat.history[:-1] == CONVERSATION
    second = [*chat.history, *single("and now?")]
    assert "".join(chat.say("and now?")).strip() == greedy(chat, second).strip()


def test_a_template_that_refuses_a_turn_is_told(chat: Chat) -> None:
    chat.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match=r"chat template refuses the turns system, user.*System role not supported"):
        list(chat.reply(CONVERSATION))
    assert chat.history == []


def test_it_knows_whether_its_answer_ended(chat: Chat) -> None:
    list(chat.say("hello"))
    assert not chat.ended, "cut off at the limit"
    asked = chat.encode(chat.history[:1]).input_ids
    written = chat.model.generate(asked, max_new_tokens=12, do_sample=False)[0, asked.shape[1] :]
    chat.tokenizer.eos_token = chat.tokenizer.convert_ids_to_tokens(written[5].item())
    chat.history.clear()
    list(chat.say("hello"))
    assert chat.ended


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
    with pytest.raises(UserError, match=r"is no model folder \(config\.json is missing\)"):
        load(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(UserError, match="no version of the policy has the alias `champion`; the policy has no version"):
        load("models:/policy@champion")
    with pytest.raises(UserError, match=r"there is no model `polcy`\. There is no model yet: `make run`"):
        load("polcy")


@pytest.mark.filterwarnings("ignore:.*[Tt]ype hint:UserWarning")  # MLflow warns of its own code
def test_a_registered_version(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    with pytest.raises(UserError, match="no version of the policy has the alias `champion`; there are policy/1"):
        load("champion")
    assert default_model() == "policy", "nobody's candidate"
    client.set_registered_model_alias("policy", "candidate", "1")
    assert default_model() == "models:/policy/1"
    client.set_registered_model_alias("policy", "champion", "1")
    assert default_model() == "models:/policy/1"
    assert [line.split(": ")[0] for line in capsys.readouterr().err.splitlines() if "mlflow" not in line] == [
        *("no policy is registered", "policy/1, the candidate", "policy/1, the champion")
    ]
    with pytest.raises(UserError, match=r"has no policy/9; there are policy/1 \(candidate, champion\)\."):
        load("policy/9")
    with pytest.raises(UserError, match=r"Did you mean `policy/1`\? There are policy/1 \(candidate, champion\)"):
        load("policy1")
    for name in ("models:/policy@champion", "policy@champion", "champion", "policy/1", "models:/policy/1"):
        assert pinned(name) == "models:/policy/1"
    loaded = load("champion")
    assert (loaded.name, loaded.max_new_tokens) == ("models:/policy/1", 7)
    assert "".join(Chat(loaded.model, loaded.tokenizer, 7, 0).say("hello"))

    client.create_registered_model("reward")
    client.create_model_version("reward", str(tmp_path / "saved"))
    shutil.copytree(folder, tmp_path / "data/models/sft")
    chat_module.show_models("models:/policy/1")
    chat_module.show_models("data/models/sft")
    chat_module.show_models("/elsewhere")
    assert capsys.readouterr().out.splitlines() == [
        *("  sft", "* policy/1     candidate, champion"),
        *("* sft", "  policy/1     candidate, champion"),
        *("  sft", "  policy/1     candidate, champion", "* /elsewhere"),
    ]


# ---- another model ----


@pytest.fixture
def workspace(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `sft`, another `policy`, a reward model, and an MLflow that does not answer."""
    shutil.copytree(folder, tmp_path / "data/models/sft")
    tiny_model_dir(tmp_path / "data/models/policy", seed=2)
    tiny_model_dir(tmp_path / "data/models/reward", reward=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    return tmp_path


def typed(*lines: str) -> Iterator[str]:
    yield from lines
    raise EOFError


def test_a_mistyped_command_is_not_said_to_the_model(
    workspace: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = typed("/modle sft")
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    chat_module.converse(chat, "data/models/sft", 12)
    assert "error: /modle is no command" in capsys.readouterr().out
    assert chat.history == []


def test_another_model_goes_on_with_the_conversation(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = typed("hello", "/model policy", "and my order", "/model")
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    loaded: list[weakref.ref[Any]] = []
    alive: list[list[bool]] = []

    def spy(name: str) -> Loaded:
        found = load(name)
        loaded.append(weakref.ref(found.model))
        return found

    original = Chat.say

    def say(chat: Chat, text: str) -> Any:
        alive.append([model() is not None for model in loaded])
        return original(chat, text)

    monkeypatch.setattr(chat_module, "load", spy)
    monkeypatch.setattr(Chat, "say", say)
    assert main(["sft", "--max-new-tokens", "12", "--temperature", "0"]) == 0
    first, told, second, *listed = capsys.readouterr().out.split("\n")  # the answers hold other ends of lines

    def chat_with(name: str) -> Chat:
        folder = Path("data/models") / name
        return Chat(load_language_model(folder), load_tokenizer(folder), 12, temperature=0)

    before = greedy(chat_with("sft"), single("hello")).strip()
    turns: Conversation = [*single("hello"), {"role": "assistant", "content": before}, *single("and my order")]
    assert first.removeprefix("model> ").strip() == before
    assert told == "(data/models/policy answers from here on; it is given what was said before, /new starts over)"
    assert second.removeprefix("model> ").strip() == greedy(chat_with("policy"), turns).strip()
    assert "MLflow at http://127.0.0.1:9" in listed[0]
    assert listed[1:3] == ["  sft", "* policy"]
    assert alive == [[True], [False, True]], "the old model's memory is given back"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("poliyc", "there is no model `poliyc`. Did you mean `policy`? There are sft, policy; or a model's folder."),
        ("base", "data/models/base is no model folder"),
        ("data/models/reward", "data/models/reward is a reward or value model: it scores answers"),
        ("data/models/damaged", "data/models/damaged cannot be loaded: "),
        ("policy/3", "models:/policy/3 from MLflow at http://127.0.0.1:9"),
        ("champion", "models:/policy@champion from MLflow at http://127.0.0.1:9"),
    ],
)
def test_a_model_that_cannot_be_loaded_changes_nothing(
    name: str, reason: str, workspace: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree("data/models/sft", "data/models/damaged")
    Path("data/models/damaged/model.safetensors").write_bytes(b"torn")
    model, lines = chat.model, typed(f"/model {name}", "hello")
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    chat_module.converse(chat, "data/models/sft", 12)
    said = capsys.readouterr().out
    assert f"error: {reason}" in said
    assert "(data/models/sft stays)" in said
    assert chat.model is model
    assert [turn["role"] for turn in chat.history] == ["user", "assistant"]


def test_the_limit_of_an_answer_goes_with_the_model_unless_it_was_given(workspace: Path, chat: Chat) -> None:
    assert switch(chat, "policy", None) == "data/models/policy"
    assert chat.max_new_tokens == chat_module.FOLDER_LIMIT
    switch(chat, "sft", 9)
    assert chat.max_new_tokens == 9
