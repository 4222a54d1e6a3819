"""Make .venv, or bring it up to date. `make` calls it with the Python that it found: environment.py [pages] [dev].

Standard library alone, for nothing is installed yet. A .venv that is there is kept unless it cannot serve: it was made
in another folder, by another Python than PYTHON= names, or has another build of torch than TORCH= names.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(".venv")
PYTHON = VENV / "bin/python"
LOG = VENV / "pip.log"
BASE = Path(getattr(sys, "_base_executable", sys.executable))  # that of .venv cannot make .venv anew
# what is installed beside `run`; each has a lock, and a stamp in .venv which holds where and from what it was installed
LOCKS = {"run": "requirements.lock", "pages": "requirements.pages.lock", "dev": "requirements.dev.lock"}
TORCH_INDEX = "https://download.pytorch.org/whl"
# GB to download and GB on disk of `run`, with torch's CPU build (and on macOS) and with a CUDA build: of the first
# the space on disk is measured, the second is taken from all sets together
SIZES = {"cpu": (0.5, 2.4), "cuda": (3.0, 6.3)}


class SetupError(Exception):
    """Told in one sentence, without a traceback."""


def main(sets: list[str]) -> None:
    os.chdir(ROOT)
    asked = os.environ.get("TORCH", "")
    anew = must_be_made(asked)
    missing = [name for name in ("run", *sets) if anew or not is_installed(name)]
    if not missing:
        return
    refuse_platform(platform.system(), platform.machine(), platform.mac_ver()[0], platform.libc_ver())
    if anew:
        make_venv()
    install(missing, asked)


def refuse_platform(system: str, machine: str, macos: str, libc: tuple[str, str]) -> None:
    """Say for which machines there is no PyTorch, before pip says that it found no matching distribution."""
    torch = f"PyTorch {pinned_torch()}"
    if system == "Darwin" and machine != "arm64":
        raise SetupError(
            f"there is no {torch} for Intel Macs, nor for a Mac's Intel Python: use an arm64 one, or Linux."
        )
    if system == "Darwin" and int(macos.partition(".")[0]) < 14:
        raise SetupError(f"{torch} needs macOS 14, and this is {macos}: update it, or use Linux.")
    if system == "Linux" and machine not in {"x86_64", "aarch64"}:
        raise SetupError(f"there is no {torch} for Linux on {machine}: use a machine with x86_64 or aarch64.")
    name, version = libc
    if system == "Linux" and (name != "glibc" or tuple(map(int, version.split("."))) < (2, 28)):
        raise SetupError(f"{torch} needs glibc 2.28: use Debian 10, Ubuntu 20.04, RHEL 8 or later, not Alpine.")


def pinned_torch() -> str:
    found = re.search(r"^torch==([\w.]+)", Path(LOCKS["run"]).read_text(), re.MULTILINE)
    assert found
    return found[1]


def stamp(name: str) -> Path:
    return VENV / ("installed" if name == "run" else f"installed.{name}")


def wanted(name: str) -> list[str]:
    """The first two lines of the stamp: scripts in .venv/bin hold its path, so that it cannot be moved."""
    return [str(ROOT), hashlib.sha256(Path(LOCKS[name]).read_bytes()).hexdigest()]


def stamped(name: str) -> list[str]:
    return stamp(name).read_text().splitlines() if stamp(name).exists() else []


def is_installed(name: str) -> bool:
    return stamped(name)[:2] == wanted(name)


def must_be_made(asked: str) -> bool:
    folder, *_, torch = stamped("run") or ["", ""]
    if folder and folder != str(ROOT):
        print(f".venv was made in {folder}: making it anew")
        return True
    if asked and torch and asked != torch:
        print(f".venv has torch's build {torch}, and TORCH={asked} is asked for: making it anew")
        return True
    if Path(sys.prefix).resolve() == VENV.resolve():
        return False
    # without PYTHON= that of .venv would have been taken, were it any good
    return not os.environ.get("PYTHON") or made_by() != (BASE.parent.resolve(), sys.version_info[:2])


def made_by() -> tuple[Path, tuple[int, ...]] | None:
    """Where the Python lies that made .venv, and its version."""
    if not (VENV / "pyvenv.cfg").exists() or not PYTHON.exists():
        return None
    lines = (VENV / "pyvenv.cfg").read_text().splitlines()
    entries = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    version = entries.get("version") or entries.get("version_info", "0.0")
    return Path(entries["home"]).resolve(), tuple(map(int, version.split(".")[:2]))


def make_venv() -> None:
    if find_spec("ensurepip") is None:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        advice = f"apt install {package}" if shutil.which("apt") else "install it, or name another Python by PYTHON="
        raise SetupError(f"{BASE} lacks its module ensurepip, and so cannot make an environment: {advice}")
    print(f"making .venv with Python {platform.python_version()} ({BASE})", flush=True)
    try:
        subprocess.run([BASE, "-m", "venv", "--clear", VENV], check=True)
    except BaseException as error:  # Ctrl-C too: half of it would be taken for the whole
        shutil.rmtree(VENV, ignore_errors=True)
        if isinstance(error, subprocess.CalledProcessError):
            raise SetupError(f"{BASE} cannot make an environment, see above: name another Python by PYTHON=") from None
        raise


def install(names: list[str], asked: str) -> None:
    for name in names:
        stamp(name).unlink(missing_ok=True)
    if "pip" not in packages():  # a .venv that uv made has none
        subprocess.run([PYTHON, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    if installed_torch().split("+")[0] != pinned_torch():
        install_torch(asked)
    for name in names:
        print(f"installing {LOCKS[name]}", flush=True)
        if not pip(
            "install", "--requirement", LOCKS[name], packages_asked=len(Path(LOCKS[name]).read_text().split("\n"))
        ):
            said = "\n".join(LOG.read_text().splitlines()[-15:])
            raise SetupError(
                f"pip could not install {LOCKS[name]}; {LOG} has all, and the same command tries again:\n{said}"
            )
        torch = asked or ("cpu" if installed_torch().endswith("+cpu") else "pypi")
        stamp(name).write_text("\n".join([*wanted(name), torch]) + "\n")


def packages() -> dict[str, str]:
    """What is installed in .venv, and its version."""
    folders = VENV.glob("lib/python*/site-packages/*.dist-info")
    return dict(folder.name.removesuffix(".dist-info").split("-", 1) for folder in folders)


def installed_torch() -> str:
    return packages().get("torch", "")


def has_nvidia_driver() -> bool:
    if Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists():
        return True
    smi = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    return smi is not None and subprocess.run([smi], capture_output=True, check=False).returncode == 0


def install_torch(asked: str) -> None:
    """Take torch from PyTorch's own index where the build matters; the lock is content with any of its version."""
    on_linux = platform.system() == "Linux"  # elsewhere there is one build
    build = (asked or ("pypi" if has_nvidia_driver() else "cpu")) if on_linux else "pypi"
    check_room("cuda" if on_linux and build != "cpu" else "cpu")
    if build == "pypi":
        return
    print(
        f"installing torch's build {build}{'' if asked else ', as there is no NVIDIA driver'}; TORCH= names another",
        flush=True,
    )
    index, version = f"{TORCH_INDEX}/{build}", f"torch=={pinned_torch()}+{build}"
    # an index out of reach is found out at once
    if pip(
        "install", "--no-deps", "--index-url", index, "--retries", "0", "--timeout", "15", version, packages_asked=1
    ):
        return
    if asked:
        raise SetupError(f"there is no {version} for this Python at {index}, or that is out of reach: see {LOG}")
    print(f"there is no {version} for this Python at {index}, or that is out of reach: PyPI's is taken, a CUDA build")
    check_room("cuda")


def check_room(build: str) -> None:
    download, disk = SIZES[build]
    need = disk + 2 * download  # pip keeps what it downloads in its cache, most often on the same disk
    free = shutil.disk_usage(VENV).free / 1e9
    print(
        f"about {download} GB to download, {disk} GB on disk ({free:.0f} GB are free); some minutes, once", flush=True
    )
    if free < need:
        raise SetupError(f"{VENV.resolve()} has {free:.1f} GB free, and installing needs {need:.1f} GB: make room")


def pip(*arguments: str, packages_asked: int) -> bool:
    """Run pip in .venv. What it says goes into a file; here stands how far it is."""
    terminal = sys.stdout.isatty()
    scratch = (VENV / "tmp").resolve()  # /tmp is often a small one in memory
    scratch.mkdir(exist_ok=True)
    settings = {"TMPDIR": str(scratch), "PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    began, before = time.monotonic(), len(packages())
    with LOG.open("w") as log:
        process = subprocess.Popen([PYTHON, "-m", "pip", *arguments], stdout=log, stderr=log, env=os.environ | settings)
    try:
        while True:
            try:
                return process.wait(timeout=1 if terminal else 30) == 0
            except subprocess.TimeoutExpired:
                far = progress(LOG.read_text(errors="replace"), packages_asked, len(packages()) - before)
                line = f"  {time.monotonic() - began:.0f} s: {far}"
                print(f"\r\033[K{line[:78]}" if terminal else line, end="" if terminal else "\n", flush=True)
    finally:
        if terminal:
            print("\r\033[K", end="", flush=True)
        process.terminate()
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def progress(said: str, asked: int, unpacked: int) -> str:
    unpacking = re.search(r"^Installing collected packages: (.+)", said, re.MULTILINE)
    if unpacking:
        return f"unpacking: {unpacked} of {unpacking[1].count(',') + 1} packages"
    looked = re.findall(r"^(?:Collecting|Requirement already satisfied:) ([\w.-]+)", said, re.MULTILINE)
    return f"package {len(looked)} of about {max(asked, len(looked))}: {looked[-1]}" if looked else "asking the index"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main(sys.argv[1:])
    except SetupError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
