"""The peer that we compare with, trl 1.12.0's PPOTrainer, in an environment of its own: `python -m bench.peer`.

TRL removed PPOTrainer after 1.12.0, and this project's own environment has a later TRL: the two cannot share one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / ".peer"
PINS = ("trl==1.12.0", "torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0")


def peer_python(folder: Path = FOLDER) -> Path:
    """The interpreter of the peer's environment, which is made on the first call."""
    python = folder / "bin" / "python"
    complete = folder / "complete.txt"  # written last: an install that broke off is made anew
    pins = "\n".join(PINS) + "\n"
    if complete.exists() and complete.read_text() == pins:
        print(f"{folder}: the peer's environment is complete", file=sys.stderr)
        return python
    print(f"{folder}: installing {' '.join(PINS)}, some minutes", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-qq", *PINS], check=True)
    complete.write_text(pins)
    return python


if __name__ == "__main__":
    print(peer_python())
