"""PPO: the trainer, usable alone, and the stage `ppo`.

`trainer`, `rollout`, `advantages` and `loss` need torch and transformers and nothing else of the pipeline's libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.stage import Stage


def run(stage: Stage) -> None:
    """Stage `ppo`; imported here so that the trainer's users need nothing that only the stage needs."""
    from tasks.ppo.pipeline import train_policy

    train_policy(stage)
