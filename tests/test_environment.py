"""What `make` does before anything is installed: which Python, which torch, what is said where something lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import environment
from environment import SetupError

ROOT = Path(__file__).parents[1]
WORKS = 'case "$1" in -c) exit 0 ;; *) echo "$0 $*" ;; esac'
LACKS_ENSUREPIP = 'case "$*" in *ensurepip*) exit 1 ;; -c*) exit 0 ;; *) echo "$0 $*" ;; esac'
BROKEN = "exit 127"  # as a shim of pyenv whose version is not chosen
SUPPORTED = ("3.11", "3.12", "3.13", "3.14")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what `make` needs, and `bin`, all that is on PATH."""
    folder = tmp_path / "a checkout"
    (folder / "bin").mkdir(parents=True)
    (folder / "data").mkdir()
    for name in ("Makefile", "environment.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "data/Makefile").symlink_to("../Makefile")
    for name in environment.LOCKS.values():
        (folder / name).write_text("")
    (folder / "requirements.lock").write_text("torch==1.0\n")
    for tool in ("dirname", "readlink"):
        (folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
    return folder


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make(
    checkout: Path, *arguments: str, folder: str = ".", fails: bool = False, variables: dict[str, str] | None = None
) -> str:
    done = subprocess.run(
        [str(shutil.which("make")), *arguments],
        cwd=checkout / folder,
        env={"PATH": str(checkout / "bin"), **(variables or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, said
    return said


def test_the_newest_python_that_works_is_taken(checkout: Path) -> None:
    for name, body in {
        "python3.14": BROKEN,
        "python3.13": LACKS_ENSUREPIP,
        "python3.12": WORKS,
        "python3": WORKS,
    }.items():
        program(checkout / "bin" / name, body)
    assert make(checkout, "environment") == f"{checkout}/bin/python3.12 environment.py\n"
    assert make(checkout, "environment/dev").endswith("python3.12 environment.py dev\n")
    program(checkout / "bin/python3.14", WORKS)
    assert "bin/python3.14 environment.py" in make(checkout, "environment")
    program(checkout / ".venv/bin/python", WORKS)
    assert make(checkout, "environment") == ".venv/bin/python environment.py\n", "what is there is kept"
    program(checkout / ".venv/bin/python", BROKEN)
    assert "bin/python3.14 environment.py" in make(checkout, "environment"), "Homebrew has taken it away, say"


def test_python_can_be_named(checkout: Path) -> None:
    program(checkout / "bin/python3.13", WORKS)
    program(checkout / "my python", WORKS)
    program(checkout / "bin/python3.9", BROKEN)
    assert make(checkout, "environment", f"PYTHON={checkout}/my python") == f"{checkout}/my python environment.py\n"
    assert "my python environment.py" in make(checkout, "environment", variables={"PYTHON": f"{checkout}/my python"})
    assert "PYTHON=python3.9" in make(checkout, "environment", "PYTHON=python3.9", fails=True)


def test_a_python_of_another_version_is_not_taken(checkout: Path) -> None:
    """The real condition, by the Python that runs this: 3.11 to 3.14 it is."""
    program(checkout / "bin/python3", f'case "$1" in -c) exec "{sys.executable}" "$@" ;; *) echo "$0 $*" ;; esac')
    assert "bin/python3 environment.py" in make(checkout, "environment")
    other = "import sys; sys.version_info = (3, 15); exec(sys.argv[1])"
    program(checkout / "bin/python3", f'exec "{sys.executable}" -c "{other}" "$2"')
    assert "no Python 3.11 to 3.14 is here" in make(checkout, "environment", fails=True)


def test_without_python_one_sentence_says_how_to_have_one(checkout: Path) -> None:
    said = make(checkout, "run", fails=True)
    assert said.count("error: ") == 1
    assert {"apt install python3 python3-venv", "brew install python@3.13", "uv"} <= {
        words for words in ("apt install python3 python3-venv", "brew install python@3.13", "uv") if words in said
    }


def test_uv_brings_a_python_where_there_is_none(checkout: Path) -> None:
    managed = checkout / "managed/python3.13"
    program(checkout / "bin/python3.13", LACKS_ENSUREPIP)
    program(managed, WORKS)
    program(
        checkout / "bin/uv",
        f'[ "$UV_PYTHON_PREFERENCE" = only-managed ] || exit 1; case "$1 $2 $3" in "python install 3.13") ;; '
        f'"python find 3.13") echo "{managed}" ;; *) exit 1 ;; esac',
    )
    assert f"{managed} environment.py" in make(checkout, "environment")
    program(checkout / "bin/uv", "echo 'error: no network' >&2; exit 2")
    assert "bin/python3.13 environment.py" in make(checkout, "environment"), "which says what it lacks"


def test_make_works_in_a_sub_folder(checkout: Path) -> None:
    program(checkout / "bin/python3.13", WORKS)
    assert "python3.13 environment.py pages" in make(checkout, "environment/pages", folder="data")
    assert "python3.13 environment.py" in make(checkout, "-f", "../bin/../Makefile", "environment", folder="bin")
    said = make(checkout, "environment", "PYTHON=python3.12", folder="data", fails=True)
    assert "PYTHON=python3.12" in said, "what is given goes along"
    assert not (checkout / "data/.venv").exists()


def test_each_folder_in_which_people_stand_has_the_makefile() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("no git repository")
    folders = {path.partition("/")[0] for path in tracked if "/" in path and not path.startswith(".")}
    lack = {folder for folder in folders if not (ROOT / folder / "Makefile").is_symlink()}
    assert not lack, "ln -s ../Makefile"


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """environment.py's own functions in that folder."""
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(environment, "ROOT", checkout)
    for name in ("PYTHON", "TORCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    return checkout


GLIBC = ("glibc", "2.36")


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (("Linux", "x86_64", "", GLIBC), None),
        (("Linux", "aarch64", "", ("glibc", "2.28")), None),
        (("Darwin", "arm64", "14.0", ("", "")), None),
        (("Darwin", "x86_64", "15.1", ("", "")), "Intel"),
        (("Darwin", "arm64", "13.6.1", ("", "")), "macOS 14"),
        (("Linux", "riscv64", "", GLIBC), "riscv64"),
        (("Linux", "x86_64", "", ("glibc", "2.17")), "glibc 2.28"),
        (("Linux", "x86_64", "", ("", "")), "Alpine"),
    ],
    ids=["linux", "linux arm", "mac", "intel mac", "old mac", "riscv", "old linux", "alpine"],
)
def test_a_machine_without_torch_is_told_so(here: Path, machine: Any, reason: str | None) -> None:
    if reason is None:
        environment.refuse_platform(*machine)
    else:
        with pytest.raises(SetupError, match=reason):
            environment.refuse_platform(*machine)


def test_a_python_without_venv_is_told_how_to_have_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(SetupError, match=rf"apt install python3\.{sys.version_info.minor}-venv"):
        environment.make_venv()


@pytest.mark.parametrize(
    "error", [subprocess.CalledProcessError(1, "venv"), KeyboardInterrupt()], ids=["fails", "Ctrl-C"]
)
def test_half_an_environment_is_not_left(here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def half(*arguments: Any, **named: Any) -> None:
        (here / ".venv/bin").mkdir(parents=True)
        raise error

    monkeypatch.setattr("subprocess.run", half)
    with pytest.raises((SetupError, KeyboardInterrupt)):
        environment.make_venv()
    assert not (here / ".venv").exists()


@pytest.fixture
def asked(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What pip is asked for; PyTorch's index is out of reach."""
    calls: list[tuple[str, ...]] = []

    def pip(*arguments: str, packages_asked: int) -> bool:
        calls.append(arguments)
        (environment.VENV / "pip.log").write_text("")
        return "--index-url" not in arguments

    monkeypatch.setattr(environment, "pip", pip)
    (here / ".venv/lib/python3/site-packages/pip-26.0.dist-info").mkdir(parents=True)
    return calls


def test_without_a_driver_torch_is_asked_for_in_its_cpu_build(
    here: Path, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.install(["run"], "")
    first, second = asked
    assert {"https://download.pytorch.org/whl/cpu", "torch==1.0+cpu"} <= set(first)
    assert second == ("install", "--requirement", "requirements.lock"), "and PyPI's where that is out of reach"
    said = capsys.readouterr().out
    for size in (*environment.SIZES["cpu"], *environment.SIZES["cuda"]):
        assert f"{size} GB" in said

    asked.clear()
    with pytest.raises(SetupError, match="cu130"):
        environment.install(["run"], "cu130")
    assert "torch==1.0+cu130" in asked[0], "one that is asked for by name has no substitute"

    asked.clear()
    monkeypatch.setattr(environment, "has_nvidia_driver", lambda: True)
    environment.install(["run", "dev"], "")
    assert [call[-1] for call in asked] == ["requirements.lock", "requirements.dev.lock"]
    asked.clear()
    monkeypatch.setattr(environment, "has_nvidia_driver", lambda: False)
    environment.install(["run"], "pypi")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    environment.install(["run"], "")
    assert [call[-1] for call in asked] == ["requirements.lock"] * 2


def test_torch_is_left_as_it_is_where_its_version_fits(here: Path, asked: list[tuple[str, ...]]) -> None:
    (here / ".venv/lib/python3/site-packages/torch-1.0+cu130.dist-info").mkdir()
    environment.install(["run"], "")
    assert asked == [("install", "--requirement", "requirements.lock")]


def test_too_small_a_disk_is_told_before_the_download(
    here: Path, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(SetupError, match=r"1\.0 GB free"):
        environment.install(["run"], "")
    assert not asked


def test_the_environment_is_made_anew_where_it_cannot_serve(
    here: Path, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(here / ".venv"))
    (here / ".venv/lib/python3/site-packages/torch-1.0+cpu.dist-info").mkdir()
    assert not environment.must_be_made("")
    environment.install(["run", "pages"], "")
    assert environment.is_installed("run")
    assert environment.is_installed("pages")
    assert not environment.is_installed("dev")
    assert not environment.must_be_made("cpu")
    assert environment.must_be_made("cu130"), "TORCH= names another build"

    (here / "requirements.lock").write_text("torch==1.0\nother==1\n")
    assert not environment.is_installed("run"), "the lock has changed"
    environment.install(["run"], "")
    assert environment.is_installed("run")

    monkeypatch.setattr(environment, "ROOT", here.parent)
    assert environment.must_be_made(""), "the folder was moved"
    monkeypatch.setattr(environment, "ROOT", here)

    monkeypatch.setattr(sys, "prefix", "/usr")
    assert environment.must_be_made(""), "its own Python does not run"
    monkeypatch.setenv("PYTHON", sys.executable)
    program(here / ".venv/bin/python", WORKS)
    home, version = environment.BASE.parent, f"{sys.version_info.major}.{sys.version_info.minor}"
    (here / ".venv/pyvenv.cfg").write_text(f"home = {home}\nversion = {version}.1\n")
    assert not environment.must_be_made(""), "PYTHON= names the one that made it"
    (here / ".venv/pyvenv.cfg").write_text(f"home = {home}\nversion_info = 3.10.1\n")
    assert environment.must_be_made("")


def test_a_pip_that_is_stopped_leaves_no_stamp(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / ".venv/lib/python3/site-packages/pip-26.0.dist-info").mkdir(parents=True)
    (here / ".venv/lib/python3/site-packages/torch-1.0.dist-info").mkdir(parents=True)
    (here / ".venv/installed").write_text(f"{here}\nof an older lock\ncpu\n")
    program(here / ".venv/bin/python", "echo Collecting everything; exec sleep 60")
    began, printed = time.monotonic(), []

    def stop(*words: Any, **named: Any) -> None:
        printed.append(words[0])
        if "everything" in words[0] or time.monotonic() - began > 30:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", stop)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        environment.install(["run"], "")
    assert time.monotonic() - began < 30, "pip is ended"
    assert not (here / ".venv/installed").exists()
    assert "package 1 of about 2: everything" in printed[-2]


def test_progress_says_how_far_pip_is() -> None:
    said = "Collecting torch==1.0\nRequirement already satisfied: numpy in x\n"
    assert environment.progress("", 5, 0) == "asking the index"
    assert environment.progress(said, 5, 0) == "package 2 of about 5: numpy"
    assert environment.progress(f"{said}Installing collected packages: a, b, c\n", 5, 2) == "unpacking: 2 of 3 packages"


def wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"version = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def test_an_environment_is_made_for_real(checkout: Path) -> None:
    """With wheels that lie in a folder of pip's settings, as torch's does on machines that are cut off."""
    wheels = checkout / "wheels"
    wheels.mkdir()
    wheel(wheels, "torch", "1.0+cpu")
    wheel(wheels, "pytest", "2.0")
    (checkout / "requirements.dev.lock").write_text("pytest==2.0\nother==1 ; python_version < '3'\n")
    (checkout / "bin/python3.12").symlink_to(environment.BASE)
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri(), "PIP_CONFIG_FILE": os.devnull, "TORCH": "cpu"}
    assert "making .venv" in make(checkout, "environment/dev", variables=pip)
    assert make(checkout, "environment/dev", "environment", variables=pip) == "", "nothing to do, nothing said"
    code = "import torch, pytest; print(torch.version, pytest.version)"
    said = subprocess.run(
        [checkout / ".venv/bin/python", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert said == "1.0+cpu 2.0\n"

    (checkout / "requirements.lock").write_text("torch==1.0\nmissing==1\n")
    said = make(checkout, "environment", fails=True, variables=pip)
    assert "No matching distribution found for missing==1" in said
    assert not (checkout / ".venv/installed").exists()


def declared() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(*names: str) -> list[Requirement]:
    lines = [line for name in names for line in (ROOT / environment.LOCKS[name]).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_locks_hold_what_pyproject_asks_for_and_agree() -> None:
    project = declared()
    asked = {
        "run": project["project"]["dependencies"],
        "pages": project["project"]["optional-dependencies"]["pages"],
        "dev": project["dependency-groups"]["dev"],
    }
    for python in SUPPORTED:
        markers = {"python_version": python, "python_full_version": f"{python}.5"}
        for name, texts in asked.items():
            locked = pins("run") + pins(name)
            versions = {pin.name: pin.specifier for pin in locked if not pin.marker or pin.marker.evaluate(markers)}
            for requirement in map(Requirement, texts):
                version = str(versions[canonicalize_name(requirement.name)]).removeprefix("==")
                assert requirement.specifier.contains(version), f"{requirement} for Python {python}: make lock"
    every = [pin for name in asked for pin in pins(name)]
    assert len({pin.name for pin in every}) == len({(pin.name, str(pin.specifier)) for pin in every}), (
        "one version each"
    )
    run = {pin.name for pin in pins("run")}
    assert not run & {"pytest", "moto", "playwright", "ruff", "mypy", "gradio", "hypothesis", "check-jsonschema"}
    assert not {name for name in run if name.startswith(("nvidia-", "cuda-")) or name == "triton"}, "torch pins its own"


def test_the_package_has_every_module_and_data_file(tmp_path: Path) -> None:
    """As `pip install .` and `pip install -e .` build it."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("flows", "tasks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "Makefile"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    files = {
        str(path.relative_to(source))
        for part in ("flows", "tasks")
        for path in (source / part).rglob("*")
        if path.is_file()
    }
    code = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    (built,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == files
    assert {"tasks/report.html", "tasks/labels/page.css", "tasks/ppo/__init__.py"} <= packed
    assert declared()["build-system"]["build-backend"] == "setuptools.build_meta"
