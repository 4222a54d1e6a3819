"""Checkpoints: whole or not there, refused with a reason, bounded on disk; states that go on as if never stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks import checkpoints as module
from tasks.checkpoints import (
    FACTS,
    FORMAT,
    MANIFEST,
    TENSORS,
    Checkpoints,
    load_optimizer_state,
    nest,
    optimizer_state,
    pick,
    remove_other_runs,
    restore_rng,
    rng_state,
)
from tests.imports import imported


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sft" / "abc"


@pytest.fixture
def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, fingerprint="abc")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, {"w": torch.full((5,), float(step))}, {"loss": step / 3})


# ---- round trip ----


def test_what_is_saved_comes_back(checkpoints: Checkpoints) -> None:
    table = torch.arange(12.0).view(3, 4)
    tensors = {
        "whole": table,
        "turned": table.T,
        "same": table,
        "row": table[1],
        "column": table[:, 1],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "one": torch.tensor(3),
        "none": torch.empty(0, 2),
        "also none": torch.empty(0),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    facts = {"loss": 0.1 + 0.2, "none": None, "list": [1, "é", {"a": False}], "best": float("inf")}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    checkpoints.save(24, tensors, facts)
    table.zero_()  # training goes on
    found = checkpoints.latest()
    assert found
    assert found.step == 24
    assert found.facts == facts
    assert found.tensors.keys() == before.keys()
    for name, tensor in found.tensors.items():
        assert tensor.dtype == before[name].dtype
        assert tensor.shape == before[name].shape
        assert torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8), before[name].contiguous().view(-1).view(torch.uint8)
        ), name
    assert abs(found.written - time.time()) < 60


def test_what_shares_memory_or_is_a_part_costs_no_more_than_its_own_size(checkpoints: Checkpoints) -> None:
    large = torch.zeros(1_000_000)
    checkpoints.save(1, {"part": large[:10], "other": large[5:15]}, {})
    assert (checkpoints.folder / "step-000001" / TENSORS).stat().st_size < 1000


def test_nothing_to_resume_from(checkpoints: Checkpoints, capfd: pytest.CaptureFixture[str]) -> None:
    assert checkpoints.latest() is None
    assert capfd.readouterr().err == ""


def test_the_newest_counts_by_number_and_not_by_name(checkpoints: Checkpoints) -> None:
    save(checkpoints, 999_999, 1_000_000)
    found = checkpoints.latest()
    assert found
    assert found.step == 1_000_000
    assert found.tensors["w"].tolist() == [1e6] * 5


def test_saving_moves_no_random_generator(checkpoints: Checkpoints) -> None:
    before = [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]  # type: ignore[index]
    save(checkpoints, 1)
    checkpoints.latest()
    assert before == [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]  # type: ignore[index]


def test_nothing_is_pickled(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    assert names(checkpoints.folder / "step-000001") == [FACTS, MANIFEST, TENSORS]
    json.loads((checkpoints.folder / "step-000001" / FACTS).read_text())


def test_it_stands_alone() -> None:
    assert imported("tasks/checkpoints.py") == set()
    code = "import sys, tasks.checkpoints; print({'transformers', 'mlflow', 'pydantic'} & sys.modules.keys())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0 s"), (90, "90 s"), (200, "3 min"), (3 * 3600, "3 h"), (50 * 3600, "2 days")]
)
def test_it_says_where_it_goes_on(
    checkpoints: Checkpoints,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
    told: str,
) -> None:
    save(checkpoints, 24)
    found = checkpoints.latest()
    assert found
    monkeypatch.setattr("time.time", lambda: found.written + seconds)
    found.announce("sft", "step", 44)
    assert capfd.readouterr().err == f"sft: resuming at step 24 of 44 (checkpoint written {told} ago)\n"


# ---- what is torn or foreign ----


def flip_a_byte(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps(manifest | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: os.truncate(path / TENSORS, 50), f"{TENSORS} is torn, 50 of "),
        (lambda path: os.truncate(path / FACTS, 3), f"{FACTS} is torn, 3 of "),
        (lambda path: os.truncate(path / MANIFEST, 20), "it cannot be read (JSONDecodeError"),
        (lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"), "it cannot be read (UnicodeDecodeError"),
        (lambda path: (path / MANIFEST).write_text("[]"), "it cannot be read (TypeError"),
        (lambda path: (path / MANIFEST).write_text("{}"), "it cannot be read (KeyError: 'format')"),
        (lambda path: (path / TENSORS).unlink(), f"{TENSORS} is missing"),
        (lambda path: (path / MANIFEST).unlink(), f"{MANIFEST} is missing"),
        (lambda path: flip_a_byte(path / TENSORS), f"{TENSORS} is damaged, its checksum is wrong"),
        (lambda path: flip_a_byte(path / TENSORS, 9), f"{TENSORS} is damaged, its checksum is wrong"),
        (lambda path: flip_a_byte(path / FACTS), f"{FACTS} is damaged, its checksum is wrong"),
        (change_manifest(fingerprint="other"), "it is of another run: its fingerprint is another"),
        (change_manifest(format=FORMAT + 1), f"its format is {FORMAT + 1}, and this code reads {FORMAT}"),
        (change_manifest(step=7), "its manifest is of step 7"),
    ],
)
def test_a_bad_one_is_refused_with_a_reason_and_the_one_before_is_used(
    checkpoints: Checkpoints,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    reason: str,
) -> None:
    save(checkpoints, 10, 20)
    bad = checkpoints.folder / "step-000020"
    damage(bad)
    found = checkpoints.latest()
    assert found
    assert found.step == 10
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: the checkpoint {bad} is not used: {reason}")
    assert line.endswith("Trying the one before.")

    # it is there to look at until the next one is written, and never counts as one of the two that are kept
    assert names(checkpoints.folder) == ["step-000010", "step-000020"]
    save(checkpoints, 15)
    assert names(checkpoints.folder) == ["step-000010", "step-000015"]
    save(checkpoints, 20)
    assert checkpoints.latest().step == 20  # type: ignore[union-attr]


def test_a_bad_one_between_good_ones_does_not_push_them_out(checkpoints: Checkpoints) -> None:
    save(checkpoints, 10, 20)
    flip_a_byte(checkpoints.folder / "step-000020" / TENSORS)
    after = Checkpoints(checkpoints.folder, fingerprint="abc")
    assert after.latest().step == 10  # type: ignore[union-attr]
    save(after, 30)
    assert names(after.folder) == ["step-000010", "step-000030"]


def test_all_bad(checkpoints: Checkpoints, capfd: pytest.CaptureFixture[str]) -> None:
    save(checkpoints, 10, 20)
    assert Checkpoints(checkpoints.folder, fingerprint="other").latest() is None
    assert capfd.readouterr().err.count("its fingerprint is another") == 2


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_half_written_is_never_read_and_is_removed(
    checkpoints: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    save(checkpoints, 10)
    for pid in (dead_pid(), os.getpid()):
        half = checkpoints.folder / f".tmp-{pid}-step-000020"
        half.mkdir()
        (half / TENSORS).write_bytes(b"half")
    parent = checkpoints.folder / f".tmp-{os.getppid()}-step-000020"  # somebody who is alive
    parent.mkdir()
    assert checkpoints.latest().step == 10  # type: ignore[union-attr]
    assert capfd.readouterr().err == ""
    save(checkpoints, 20)
    assert names(checkpoints.folder) == [parent.name, "step-000010", "step-000020"]


@pytest.mark.parametrize("last", ["save_file", "_sha256", "_flush", "rename"])
def test_a_write_that_ends_early_leaves_the_ones_before(
    checkpoints: Checkpoints, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """A full disk at any point costs this checkpoint, not the training; Ctrl-C goes through."""
    save(checkpoints, 10, 20)

    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Path if last == "rename" else module, last, fail)
            if isinstance(error, OSError):
                save(checkpoints, 30)
                told = capfd.readouterr().err
                assert "step-000030 could not be written ([Errno 28] No space left on device); going on." in told
            else:
                with pytest.raises(KeyboardInterrupt):
                    save(checkpoints, 30)
        assert names(checkpoints.folder) == ["step-000010", "step-000020"]
    save(checkpoints, 40)
    assert names(checkpoints.folder) == ["step-000020", "step-000040"]


# ---- room on disk ----


def test_old_ones_are_removed(checkpoints: Checkpoints) -> None:
    save(checkpoints, 2, 4, 6, 8, 10)
    assert names(checkpoints.folder) == ["step-000008", "step-000010"]
    one = Checkpoints(checkpoints.folder, fingerprint="abc", keep=1)
    save(one, 12)
    assert names(one.folder) == ["step-000012"]
    one.clear()
    assert not one.folder.exists()
    one.clear()


def test_a_run_that_begins_anew_replaces_what_is_there(checkpoints: Checkpoints) -> None:
    save(checkpoints, 2, 4)
    save(checkpoints, 2)
    assert names(checkpoints.folder) == ["step-000002"]


def test_of_other_runs_the_newest_checkpoint_of_the_last_one_stays(tmp_path: Path) -> None:
    remove_other_runs(tmp_path / "sft" / "new")  # nothing there yet
    for age, name in enumerate(("first", "second", "third")):
        other = tmp_path / "sft" / name
        save(Checkpoints(other, fingerprint=name), 1, 2)
        (other / f".tmp-{dead_pid()}-step-000003").mkdir()
        os.utime(other, (age, age))
    own = Checkpoints(tmp_path / "sft" / "first", fingerprint="first")
    remove_other_runs(own.folder)
    assert names(tmp_path / "sft") == ["first", "third"]
    assert names(tmp_path / "sft" / "third") == ["step-000002"]
    assert own.latest().step == 2  # type: ignore[union-attr]
    assert (own.folder / "step-000001").exists()
    # the one that was used last, not the one that was looked at last
    save(own, 3)
    remove_other_runs(tmp_path / "sft" / "fourth")
    assert names(tmp_path / "sft") == ["first"]


# ---- names ----


def test_nest_and_pick() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    nested = nest("policy", nest("optimizer", {"3/exp_avg": a})) | nest("policy", {"w": b}) | {"policyholder": b}
    assert set(nested) == {"policy/optimizer/3/exp_avg", "policy/w", "policyholder"}
    assert pick("policy/optimizer", nested) == {"3/exp_avg": a}
    assert set(pick("policy", nested)) == {"optimizer/3/exp_avg", "w"}
    assert pick("value", nested) == {}


# ---- optimizers ----


def a_model(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 1))


def adamw(model: torch.nn.Sequential, **options: Any) -> torch.optim.Optimizer:
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters(), "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), **options)


OPTIMIZERS: dict[str, Callable[[torch.nn.Sequential], torch.optim.Optimizer]] = {
    "AdamW": adamw,
    "AdamW fused": lambda model: adamw(model, fused=True),
    "AdamW amsgrad": lambda model: adamw(model, amsgrad=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.1),
}


def train(model: torch.nn.Sequential, optimizer: torch.optim.Optimizer, schedule: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(checkpoints: Checkpoints, name: str) -> None:
    def start(seed: int) -> tuple[torch.nn.Sequential, torch.optim.Optimizer, Any]:
        model = a_model(seed)
        optimizer = OPTIMIZERS[name](model)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 3))

    through = start(1)
    train(*through, range(9))

    model, optimizer, schedule = start(1)
    train(model, optimizer, schedule, range(4))
    tensors, facts = optimizer_state(optimizer)
    checkpoints.save(
        4,
        nest("model", model.state_dict()) | nest("optimizer", tensors),
        {"optimizer": facts, "schedule": schedule.state_dict()},
    )
    train(model, optimizer, schedule, range(4, 6))  # lost

    model, optimizer, schedule = start(2)
    found = checkpoints.latest()
    assert found
    model.load_state_dict(pick("model", found.tensors))
    load_optimizer_state(optimizer, pick("optimizer", found.tensors), found.facts["optimizer"])
    schedule.load_state_dict(found.facts["schedule"])
    train(model, optimizer, schedule, range(4, 9))

    for weight, expected in zip(model.parameters(), through[0].parameters(), strict=True):
        assert torch.equal(weight, expected)
    assert_same(optimizer.state_dict(), through[1].state_dict())
    assert schedule.get_last_lr() == through[2].get_last_lr()


def assert_same(one: Any, other: Any) -> None:
    """The same types, tuples as tuples, and the same bits."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def test_an_optimizer_that_has_not_stepped_yet() -> None:
    tensors, facts = optimizer_state(adamw(a_model(1)))
    assert tensors == {}
    optimizer = adamw(a_model(2))
    load_optimizer_state(optimizer, tensors, json.loads(json.dumps(facts)))
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.95)


def test_an_optimizer_over_other_parameters() -> None:
    _, facts = optimizer_state(torch.optim.Adam(a_model(1).parameters()))
    with pytest.raises(ValueError, match="parameter group"):
        load_optimizer_state(torch.optim.Adam(a_model(1)[0].parameters()), {}, facts)
    with pytest.raises(ValueError, match="zip"):
        load_optimizer_state(adamw(a_model(1)), {}, facts)


# ---- random generators ----


def draws() -> list[float]:
    drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]
    return drawn + (torch.randn(3, device="cuda").tolist() if torch.cuda.is_available() else [])


def test_random_generators_go_on_where_they_were(checkpoints: Checkpoints) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()  # the Gaussian ones come in pairs: the other half is part of the state
    tensors, facts = rng_state()
    checkpoints.save(1, nest("rng", tensors), {"rng": facts})
    expected = [draws(), draws()]
    found = checkpoints.latest()
    assert found
    for _ in range(2):
        restore_rng(pick("rng", found.tensors), found.facts["rng"])
        assert [draws(), draws()] == expected


def test_random_generators_where_numpy_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    tensors, facts = rng_state()
    assert "numpy" not in tensors
    expected = random.random()
    restore_rng(tensors, json.loads(json.dumps(facts)))
    assert random.random() == expected
