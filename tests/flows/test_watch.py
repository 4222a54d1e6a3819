"""An event when labels or raw data are new, and not otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import watch
from flows.watch import Watcher
from tests.tiny import shell, tiny_repo


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(watch, "emit_event", lambda event, **more: sent.append({"event": event, **more}))
    return sent


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tiny_repo(tmp_path / "repo")
    (folder / "data/raw").mkdir(parents=True)
    (folder / "data/raw/tickets.jsonl").write_text("{}\n")
    shell(folder, "dvc", "add", "--quiet", "data/raw/tickets.jsonl")
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    shell(folder, "git", "add", ".")
    shell(folder, "git", "commit", "--quiet", "--allow-empty", "-m", "Change")


def test_new_raw_data_and_labels_are_told_once(
    repository: Path, events: list[dict[str, Any]], prefect_api: str
) -> None:
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        watcher = Watcher(repository)
        assert not watcher.look()  # the first look takes note
        assert not watcher.look()
        (repository / "README").write_text("new")
        commit(repository)
        assert not watcher.look(), "another file is no label"

        (repository / "data/raw/tickets.jsonl").unlink()
        (repository / "data/raw/tickets.jsonl").write_text("{}\n{}\n")
        shell(repository, "dvc", "add", "--quiet", "data/raw/tickets.jsonl")
        assert not watcher.look(), "what is not committed cannot be run"
        commit(repository)
        assert watcher.look()
        assert not watcher.look()
        assert not Watcher(repository).look(), "a restart tells nothing twice"

        (repository / "data/labels").mkdir()
        (repository / "data/labels/ann.jsonl").write_text("{}\n")
        commit(repository)
        assert watcher.look()
    head = shell(repository, "git", "rev-parse", "HEAD").strip()
    assert [event["event"] for event in events] == ["rlhf.new-labels"] * 2
    assert events[-1]["payload"] == {"revision": head}


def test_what_others_push_is_seen(
    repository: Path, tmp_path: Path, events: list[dict[str, Any]], prefect_api: str
) -> None:
    mine = tmp_path / "mine"
    shell(tmp_path, "git", "clone", "--quiet", str(repository), str(mine))
    before = shell(mine, "git", "rev-parse", "HEAD")
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        watcher = Watcher(mine)
        watcher.look()
        (repository / "data/labels").mkdir()
        (repository / "data/labels/bo.jsonl").write_text("{}\n")
        commit(repository)
        assert watcher.look()
    assert events[0]["payload"] == {"revision": shell(repository, "git", "rev-parse", "HEAD").strip()}
    assert shell(mine, "git", "rev-parse", "HEAD") == before, "the repository is left as it was"


def test_an_import_counts_when_its_source_changes(
    repository: Path, tmp_path: Path, events: list[dict[str, Any]], prefect_api: str
) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text("{}\n")
    shell(repository, "dvc", "import-url", "--quiet", str(source), "data/raw/source.jsonl")
    commit(repository)
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        watcher = Watcher(repository)
        watcher.look()
        assert not watcher.look()
        source.write_text("{}\n{}\n")
        assert watcher.look()
        assert not watcher.look()


def test_files_that_appear_at_the_remote_count(
    repository: Path, tmp_path: Path, events: list[dict[str, Any]], prefect_api: str
) -> None:
    incoming = tmp_path / "repo-remote/incoming"
    incoming.mkdir(parents=True)
    (incoming / "ann.jsonl").write_text("{}\n")
    shell(repository, "dvc", "import-url", "--quiet", "remote://local/incoming", "data/raw/incoming")
    commit(repository)
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        watcher = Watcher(repository)
        watcher.look()
        assert not watcher.look()
        (incoming / "bo.jsonl").write_text("{}\n")
        assert watcher.look()
        assert not watcher.look()


def test_an_import_from_another_repository_counts_by_what_it_holds(
    repository: Path, tmp_path: Path, events: list[dict[str, Any]], prefect_api: str
) -> None:
    other = tiny_repo(tmp_path / "other")
    (other / "labels.jsonl").write_text("{}\n")
    commit(other)
    shell(repository, "dvc", "import", "--quiet", str(other), "labels.jsonl", "--out", "data/raw/labels.jsonl")
    commit(repository)
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        watcher = Watcher(repository)
        watcher.look()
        (other / "README").write_text("nothing to do with it")
        commit(other)
        assert not watcher.look()
        for lines in (2, 3):  # the import itself stays as it was, and each change is seen
            (other / "labels.jsonl").write_text("{}\n" * lines)
            commit(other)
            assert watcher.look()
            assert not watcher.look()


def test_a_source_that_cannot_be_reached_is_a_warning(
    repository: Path, tmp_path: Path, events: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], prefect_api: str
) -> None:
    mine = tmp_path / "mine"
    shell(tmp_path, "git", "clone", "--quiet", str(repository), str(mine))
    repository.rename(tmp_path / "gone")
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        assert not Watcher(mine).look()
    assert "warning: cannot look for new labels" in capsys.readouterr().err


def test_what_could_not_be_told_is_told_at_the_next_look(
    repository: Path, events: list[dict[str, Any]], prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        watcher = Watcher(repository)
        watcher.look()
        (repository / "data/labels").mkdir()
        (repository / "data/labels/ann.jsonl").write_text("{}\n")
        commit(repository)
        with monkeypatch.context() as away:

            def fail(*_: Any, **__: Any) -> None:
                raise ConnectionError("gone")

            away.setattr(watch, "emit_event", fail)
            assert not watcher.look()
        assert watcher.look()
