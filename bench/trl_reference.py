"""Numbers of trl 1.12.0's PPOTrainer on a tiny model, written down for tests/tasks/ppo/test_trl.py to compare with.

    bench/.peer/bin/python bench/trl_reference.py      (`python -m bench.peer` makes that environment)

writes tests/tasks/ppo/trl_1_12.json and trl_1_12.safetensors. TRL's own train() runs, unchanged; what it would have
sampled is made up from a seed. Its local variables are read where it calls something that we can put a hook on
(accelerator.backward, self.log: the caller's frame is train()'s), its gradients by a hook on the optimizer's step.

Shapes: B = 8 episodes, P = 5 prompt tokens (left-padded), R = 6 response tokens, b rows of a micro-batch. Masks: True
means keep. Floats are fp32. One update a case; optimizer steps k and micro-batches m count from 0.

Tensors
    models/<model>/<parameter>            policy, reference, value, reward: weights before training (the policy's and
                                          the reference's output layer is the embedding)
    <lengths>/queries, responses          (B, P), (B, R) int64; <lengths> is `fixed` (no row ends) or `ragged` (rows end
                                          with the end token, padding after it; row 0 runs the full length without one)
    <case>/scores                         (B,) reward model's output at the last token, less missing_eos_penalty
    <case>/logprobs, ref_logprobs         (B, R) at the temperature; 1.0 on padding (TRL's INVALID_LOGPROB)
    <case>/values, rewards, returns       (B, R) values and rewards before the update, 0 beyond value_mask
    <case>/advantages                     (B, R) whitened (unbiased variance) over response_mask, 0 beyond it
    <case>/response_mask, value_mask      (B, R) bool; value_mask keeps one position more in rows that ended
    <case>/step<k>/policy_grad/<param>    gradient that the step applies, of the chosen parameters; value_grad alike
    <case>/step<k>/micro<m>/ratio         (b, R) probability ratio, 1 on padding; its rows are in the json
    <case>/step<k>/micro<m>/values        (b, R) of the value model at that moment, 0 beyond value_mask
    <case>/final/<model>/<parameter>      chosen parameters of policy and value after the last step (epochs 4 only)

The json: `versions`, `model_config` (LlamaConfig arguments), `settings` (of every case) and `cases`: each with its own
settings, `optimizer` (AdamW's, as TRL made it), `metrics` (as TRL logs them) and `steps`: norm of either model's whole
gradient, and `micro`: rows, pg_loss, vf_loss, clip_fraction, value_clip_fraction, approx_kl, entropy, mean_ratio.

Where TRL departs from the paper, or from itself (ppo_trainer.py of 1.12.0, by line)
    837, 846, 848  Losses are means over the tokens of a micro-batch, then accelerate averages the micro-batches: under
                   gradient accumulation a token in a micro-batch of short rows weighs more. On rows of equal length
                   it makes no difference.
    767, 778-779   In a row that ended the score is added one position past the last token, on padding; GAE runs through
                   that position, with the value after the end token as its baseline. For gamma = lambda = 1 this
                   cancels on real tokens; otherwise the score is discounted once more, and that value leaks in.
    768, 837       The value loss is averaged over that position too: one for each row that ended before R tokens.
    266            Advantages are whitened with the unbiased variance (lm-human-preferences: the biased one).
    857, 867, 868  approx_kl (half the mean square, the k2 estimator), entropy and mean_ratio are means over all
                   positions, padding included; clip_fraction is over response tokens.
    809, 849       A step is taken each gradient_accumulation_steps micro-batches, wherever a minibatch ends: 2
                   minibatches with 2 accumulation steps are one step. Cases with 2 minibatches have no accumulation.
    810            accelerate does not accumulate while the loader is at its last batch: there TRL steps at each
                   micro-batch, with a gradient divided by their number. (Measured: with 2 accumulation steps and a
                   dataset of two batches, 1 step and then 2.) Here a plain list stands in for the loader, which shows
                   what TRL does on every other batch.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read at import

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

OUTPUT = Path(__file__).parent.parent / "tests" / "tasks" / "ppo"
PAD, END = 0, 2
MODEL_CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": END,
}
PROMPT_LENGTHS = [5, 3, 4, 2, 5, 3, 1, 4]
RAGGED_LENGTHS = [6, 1, 2, 3, 6, 5, 4, 3]  # end token included; the first row has none
BATCH, PROMPT_LENGTH, RESPONSE_LENGTH = 8, 5, 6
SETTINGS = {
    "kl_coef": 0.05,
    "gamma": 1.0,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 1.0,
    "whiten_rewards": False,
    "temperature": 0.7,
    "learning_rate": 0.001,
    "response_length": RESPONSE_LENGTH,
    "total_episodes": BATCH,
}
CHOSEN = (  # parameters whose gradients and final weights are kept
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
    "score.weight",
)


class Case(NamedTuple):
    lengths: str  # fixed or ragged
    epochs: int
    accumulation: int
    gae_lambda: float
    minibatches: int = 1

    @property
    def name(self) -> str:
        return (
            f"{self.lengths}-epochs{self.epochs}-accumulation{self.accumulation}"
            f"-lambda{self.gae_lambda}-minibatches{self.minibatches}"
        )

    @property
    def missing_eos_penalty(self) -> float | None:
        return 1.0 if self.lengths == "ragged" else None

    @property
    def stop_token_id(self) -> int | None:
        return END if self.lengths == "ragged" else None


CASES = [
    *(Case(*choice) for choice in itertools.product(["fixed", "ragged"], [1, 4], [1, 2], [1.0, 0.95])),
    Case("fixed", 4, 1, 0.95, minibatches=2),
    Case("ragged", 4, 1, 0.95, minibatches=2),
]


class Models(NamedTuple):
    policy: Any
    reference: Any
    value: Any
    reward: Any


def make_models() -> Models:
    """The same weights each time: a case starts where every other started."""
    torch.manual_seed(0)
    config = LlamaConfig(**MODEL_CONFIG, num_labels=1)
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    reference.load_state_dict(policy.state_dict())
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return Models(policy, reference, LlamaForSequenceClassification(config), LlamaForSequenceClassification(config))


def make_rollout(lengths: str) -> tuple[Tensor, Tensor]:
    """Prompts (B, P) and responses (B, R) of random tokens, none of them PAD or END but where a row ends."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(3, MODEL_CONFIG["vocab_size"], (BATCH, PROMPT_LENGTH), generator=generator)
    responses = torch.randint(3, MODEL_CONFIG["vocab_size"], (BATCH, RESPONSE_LENGTH), generator=generator)
    for row, length in enumerate(PROMPT_LENGTHS):
        queries[row, : PROMPT_LENGTH - length] = PAD
    if lengths == "ragged":
        for row, length in enumerate(RAGGED_LENGTHS[1:], start=1):
            responses[row, length - 1] = END
            responses[row, length:] = PAD
    return queries, responses


class Recorder:
    """Writes down what train() does, from the places where it calls out. The caller's frame is train()'s."""

    def __init__(self, case: Case, trainer: PPOTrainer) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.steps: list[dict[str, Any]] = []
        self.micro: list[dict[str, Any]] = []  # since the last step
        self.metrics: dict[str, float] = {}
        self.case, self.trainer = case, trainer
        self.real_backward = trainer.accelerator.backward
        trainer.accelerator.backward = self.backward
        trainer.log = self.log
        trainer.optimizer.optimizer.register_step_pre_hook(self.step)

    def keep(self, name: str, tensor: Tensor) -> None:
        self.tensors[f"{self.case.name}/{name}"] = tensor.detach().clone().contiguous()

    def backward(self, loss: Tensor) -> None:
        """Called once a micro-batch, by train()."""
        local = sys._getframe(1).f_locals
        prefix = f"step{len(self.steps)}/micro{len(self.micro)}"
        self.keep(f"{prefix}/ratio", local["ratio"])
        self.keep(f"{prefix}/values", local["vpred"])
        self.micro.append({"rows": local["micro_batch_inds"].tolist()})
        self.real_backward(loss)

    def step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called by the optimizer itself before it steps, so not while gradients still accumulate."""
        norms = {}
        for name, model in (("policy", self.trainer.policy_model), ("value", self.trainer.value_model)):
            for parameter, weight in model.named_parameters():
                if parameter in CHOSEN:
                    self.keep(f"step{len(self.steps)}/{name}_grad/{parameter}", weight.grad)
            gradients = [weight.grad for weight in model.parameters()]
            norms[f"{name}_grad_norm"] = torch.nn.utils.get_total_norm(gradients).item()
        self.steps.append({**norms, "micro": self.micro})
        self.micro = []

    def log(self, metrics: dict[str, float]) -> None:
        """Called by train() after the last epoch: the rollout and each micro-batch's figures are there still."""
        local = sys._getframe(1).f_locals
        for name in ("scores", "logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            self.keep(name, local[name])
        self.keep("response_mask", ~local["padding_mask"])
        self.keep("value_mask", ~local["padding_mask_p1"])
        names = {
            "pg_loss": "pg_loss",
            "vf_loss": "vf_loss",
            "clip_fraction": "pg_clipfrac",
            "value_clip_fraction": "vf_clipfrac",
            "approx_kl": "approxkl",
            "entropy": "entropy",
            "mean_ratio": "ratio",
        }
        micro_batches = [micro for step in self.steps for micro in step["micro"]]
        for ours, theirs in names.items():  # (epochs, minibatches, accumulation), in the order they were filled
            figures = local[f"{theirs}_stats"].flatten().tolist()
            for micro, figure in zip(micro_batches, figures, strict=True):
                micro[ours] = figure
        # eps is episodes a second; the variance of a single micro-batch's mean ratio is not a number
        self.metrics = {name: value for name, value in metrics.items() if name not in ("eps", "val/ratio_var")}


def run_case(case: Case, output: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    models = make_models()
    queries, responses = make_rollout(case.lengths)
    arguments = PPOConfig(
        **SETTINGS,
        output_dir=output,
        num_ppo_epochs=case.epochs,
        num_mini_batches=case.minibatches,
        per_device_train_batch_size=BATCH // case.accumulation,
        gradient_accumulation_steps=case.accumulation,
        lam=case.gae_lambda,
        missing_eos_penalty=case.missing_eos_penalty,
        stop_token_id=case.stop_token_id,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=END),
        model=models.policy,
        ref_model=models.reference,
        reward_model=models.reward,
        value_model=models.value,
        train_dataset=Dataset.from_dict({"input_ids": queries.tolist()}),
    )
    trainer.dataloader = [{"input_ids": queries}]  # in this order, and never "at its last batch" (see above)
    ppo_trainer.batch_generation = lambda policy, *_: made_up_generation(policy, queries, responses)
    recorder = Recorder(case, trainer)
    np.random.seed(0)  # train() shuffles with the global generator
    trainer.train()
    if case.epochs > 1:
        for name, model in (("policy", models.policy), ("value", models.value)):
            for parameter, weight in model.named_parameters():
                if parameter in CHOSEN:
                    recorder.keep(f"final/{name}/{parameter}", weight)
    described = {
        **case._asdict(),
        "missing_eos_penalty": case.missing_eos_penalty,
        "stop_token_id": case.stop_token_id,
        "metrics": recorder.metrics,
        "steps": recorder.steps,
        "optimizer": describe_optimizer(trainer.optimizer.optimizer),
    }
    return recorder.tensors, described


@torch.no_grad()
def made_up_generation(policy: Any, queries: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """In place of TRL's batch_generation, as that returns them: tokens (B, P + R), logits (B, R, V) / temperature."""
    tokens = torch.cat((queries, responses), 1)
    logits = ppo_trainer.forward(policy, tokens, PAD).logits[:, PROMPT_LENGTH - 1 : -1]
    return tokens, logits / (SETTINGS["temperature"] + 1e-7)


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """AdamW's settings as TRL made it; the two groups differ in weight decay alone, and that is 0."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    assert all(group == options[0] for group in options), options
    return {"class": type(optimizer).__name__, **options[0]}


def main() -> None:
    torch.set_num_threads(1)
    models = make_models()
    tensors: dict[str, Tensor] = {}
    for name, model in models._asdict().items():
        tensors |= {f"models/{name}/{parameter}": weight.detach() for parameter, weight in model.named_parameters()}
    for lengths in ("fixed", "ragged"):
        tensors[f"{lengths}/queries"], tensors[f"{lengths}/responses"] = make_rollout(lengths)
    cases = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as output:
            kept, cases[case.name] = run_case(case, output)
        tensors |= kept
    described = {
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")},
        "model_config": MODEL_CONFIG,
        "settings": SETTINGS,
        "cases": cases,
    }
    save_file(tensors, OUTPUT / "trl_1_12.safetensors")
    (OUTPUT / "trl_1_12.json").write_text(json.dumps(described, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
