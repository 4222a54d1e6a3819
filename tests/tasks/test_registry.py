"""Promote, roll back, list: on a real MLflow store with versions that hold nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.registry import decline, main, parse_version, taken_back
from tasks.stage import UserError
from tasks.tracking import connect


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three policies, each with companions of the same number."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    client = connect()
    for name in ("sft", "reward", "policy"):
        client.create_registered_model(name)
        for number in range(1, 4):
            client.create_model_version(name, "file:///nowhere", tags={"gates.passed": "true"})
            if name == "policy":
                for companion in ("sft", "reward"):
                    client.set_model_version_tag(name, str(number), f"with.{companion}", str(number))
    return client


def champions(client: Any) -> list[str]:
    return [str(client.get_model_version_by_alias(name, "champion").version) for name in ("sft", "reward", "policy")]


def test_promote_and_roll_back_with_author_and_reason(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", "policy/1", "--reason", "the first", "--author", "ann"]) == 0
    assert main(["promote", "policy/3", "--reason", "better", "--author", "bob"]) == 0
    assert champions(client) == ["3", "3", "3"]
    tags = client.get_model_version("policy", "3").tags
    assert (tags["champion.author"], tags["champion.reason"], tags["champion.replaced"]) == ("bob", "better", "1")

    assert main(["rollback", "--reason", "too long", "--author", "cy"]) == 0
    assert champions(client) == ["1", "1", "1"]
    tags = client.get_model_version("policy", "3").tags
    assert (tags["rolled_back.author"], tags["rolled_back.reason"]) == ("cy", "too long")
    assert capsys.readouterr().out.splitlines()[-1] == "champion: policy/1 (before: policy/3)"

    assert main(["rollback", "--reason", "again"]) == 2
    assert "policy/1 replaced no other version" in capsys.readouterr().err
    main(["list"])
    shown = capsys.readouterr().out
    assert "rolled back: too long (cy" in shown
    assert "the first (ann" in shown


def test_a_version_that_was_taken_back_can_be_promoted_again(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for number in "12":
        main(["promote", f"policy/{number}", "--reason", "better", "--author", "ann"])
    main(["rollback", "--reason", "too long", "--author", "cy"])
    assert taken_back(client.get_model_version("policy", "2")).startswith("rolled back: too long (cy, ")
    decline(client, "3", author="bob", reason="rude")
    assert taken_back(client.get_model_version("policy", "3")).startswith("declined: rude (bob, ")
    assert taken_back(client.get_model_version("policy", "1")) == ""
    main(["promote", "policy/2", "--reason", "looked again", "--author", "dan"])
    assert taken_back(client.get_model_version("policy", "2")) == ""
    main(["list"])
    shown = capsys.readouterr().out
    assert "looked again (dan" in shown
    assert "too long" not in shown


def test_a_rollback_to_a_version_that_is_gone_changes_nothing(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for number in "12":
        main(["promote", f"policy/{number}", "--reason", "better"])
    client.delete_model_version("policy", "1")
    assert main(["rollback", "--reason", "too long"]) == 2
    assert "has no policy/1" in capsys.readouterr().err
    assert taken_back(client.get_model_version("policy", "2")) == ""
    assert champions(client) == ["2", "2", "2"]


def test_nothing_is_registered_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert main(["list"]) == 2
    assert "nothing is registered yet" in capsys.readouterr().err


def test_promoting_the_champion_changes_nothing(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(["promote", "policy/1", "--reason", "the first"])
    main(["promote", "policy/2", "--reason", "the second"])
    before = client.get_model_version("policy", "2").tags
    capsys.readouterr()
    assert main(["promote", "policy/2", "--reason", "once more"]) == 0
    assert capsys.readouterr().out == "policy/2 is the champion already; nothing was recorded.\n"
    assert client.get_model_version("policy", "2").tags == before  # what it replaced is still known


def test_a_version_that_failed_gates_can_be_promoted_and_it_is_said(
    client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client.set_model_version_tag("policy", "2", "gates.passed", "false")
    client.set_model_version_tag("policy", "2", "gates.failed", "kl")
    assert main(["promote", "policy/2", "--reason", "looked at by hand"]) == 0
    assert "policy/2 failed gates: kl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["promote", "policy/9", "--reason", "x"], "has no policy/9"),
        (["promote", "sft/1", "--reason", "x"], "`sft/1` is no version of a model"),
        (["promote", "policy/x", "--reason", "x"], "`policy/x` is no version of a model"),
        (["promote", "policy@nobody", "--reason", "x"], "no version of the policy has the alias `nobody`"),
        (["promote", "policy/1", "--reason", " "], "--reason is empty"),
        (["rollback", "--reason", "x"], "there is no champion to roll back from"),
    ],
)
def test_mistakes_are_told(client: Any, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_names_of_versions() -> None:
    assert [parse_version(text) for text in ("policy/3", "3", "models:/policy/3", "policy@champion")] == [
        *(("policy", "3"), ("policy", "3"), ("policy", "3"), ("policy", "@champion")),
    ]
    assert parse_version("models:/reward@candidate") == ("reward", "@candidate")
    with pytest.raises(UserError):
        parse_version("policy")
