"""What is refused before the first update, and how."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from tasks.conversations import single, text_of
from tasks.models import load_language_model, load_scalar_model, load_tokenizer
from tasks.ppo.params import PPOParams
from tasks.ppo.ptx import Text
from tasks.ppo.trainer import PPOTrainer
from tasks.stage import UserError
from tests.tasks.ppo.toy import END, PROMPTS, SETTINGS, Folders, liked, make_trainer
from tests.tiny import CONVERSATION, IN_CHATML


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": 0}, "updates is 0, and must be above 0"),
        ({"trainable_layers": 0}, "trainable_layers is 0, and must be at least 1"),
        ({"gamma": 1.5}, "gamma is 1.5, and must be at most 1"),
        ({"adam_betas": (0.9, -0.1)}, "adam_betas is -0.1, and must be at least 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf, not a finite number"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas is 1.0, and must be below 1"),
        ({"kl_estimator": "k2"}, "kl_estimator is 'k2', and must be one of 'k1', 'k3'"),
        ({"precision": "fp16"}, "precision is 'fp16', and must be one of 'fp32', 'bf16'"),
        ({"updates": 2.5}, "updates is 2.5, and must be a whole number"),
        ({"epochs": True}, "epochs is True, and must be a whole number"),
        ({"trainable_layers": "8"}, "trainable_layers is '8', and must be 'all' or a whole number"),
        ({"kl_limit": "40"}, "kl_limit is '40', and must be a number or None"),
        ({"adam_betas": 0.9}, "adam_betas is 0.9, and must be 2 values, each a number"),
        ({"ema_decay": 0.0}, "ema_decay is 0.0, and must be above 0"),
        ({"kl_target": -1.0}, "kl_target is -1.0, and must be above 0"),
        ({"batch_size": 10, "samples_per_prompt": 4, "minibatch_size": 4}, "batch_size 10 is not a multiple of"),
        ({"minibatch_size": 24}, "batch_size 64 does not divide into minibatches of 24"),
        ({"micro_batch_size": 3, "samples_per_prompt": 2}, "micro_batch_size 3 is not a multiple of"),
        ({"patience": 2}, "patience counts held-out evaluations, and eval_every is 0"),
    ],
)
def test_parameters_out_of_range_or_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOParams(**changes)


def test_all_wrong_parameters_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"updates is 0.*; gamma is 2"):
        PPOParams(updates=0, gamma=2)


def start(folders: Folders, prompts: Any = PROMPTS, *, arguments: dict[str, Any] | None = None, **changes: Any) -> None:
    make_trainer(folders, arguments=arguments, **changes) if prompts is PROMPTS else PPOTrainer(
        load_language_model(folders.sft),
        None,
        liked,
        load_scalar_model(folders.reward),
        prompts,
        PPOParams(**SETTINGS),
        **(arguments or {}),
    )


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are no prompts"),
        ([[5], []], "prompt 1 is empty"),
        (
            [[5], [6] * 200],
            "prompt 1 has 200 tokens, and with 64 of a response that is more than the model's context of 256",
        ),
        ([[5, 330]], "prompt 0 has a token that is not in the vocabulary of 330"),
        ([[]] * 9, "prompt 4 is empty (and 4 more)"),
    ],
)
def test_prompts(folders: Folders, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        start(folders, prompts)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"eval_every": 1, "eval_prompts": 6}, {}, "6 prompts leave none to train on when eval_prompts 6 are held out"),
        ({}, {"pad_token": END}, "end and padding are one token, 2"),
        ({"ptx_coef": 1.0}, {}, "ptx_coef is 1, and no pretraining texts were handed in"),
        ({"ptx_coef": 1.0}, {"pretraining": [Text([], [5])]}, "a pretraining text is empty"),
        ({"trainable_layers": 3}, {}, "trainable_layers is 3, and the model has 2 layers"),
    ],
)
def test_what_does_not_fit_together(
    folders: Folders, changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        start(folders, arguments=arguments, **changes)


def build(folders: Folders, value_model: Any = None, reward: Any = liked, **changes: Any) -> PPOTrainer:
    params = PPOParams(**{**SETTINGS, **changes})
    return PPOTrainer(load_language_model(folders.sft), None, reward, value_model, PROMPTS, params)


def test_the_value_model_and_the_parameter_agree(folders: Folders) -> None:
    with pytest.raises(
        UserError, match=r'a value model is missing: hand in the reward model, say, or set value to "head"'
    ):
        build(folders)
    with pytest.raises(UserError, match='a value model was handed in, and value is "head"'):
        build(folders, load_scalar_model(folders.reward), value="head")


def test_a_reward_model_with_another_tokenizer(folders: Folders) -> None:
    other = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=1,
        )
    )
    with pytest.raises(UserError, match="reads 100 tokens and the policy 330: they have different tokenizers"):
        build(folders, load_scalar_model(folders.reward), other)


def test_a_model_without_blocks_to_split(folders: Folders) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=330, n_embd=32, n_layer=1, n_head=2, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    )
    with pytest.raises(UserError, match=r"GPT2LMHeadModel has no `model\.layers`"):
        PPOTrainer(gpt2, None, liked, None, PROMPTS, PPOParams(**{**SETTINGS, "value": "head"}))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
        ("Cohere", {"logit_scale": 0.5}),
        ("Gemma2", {"final_logit_softcapping": 1.0, "head_dim": 16}),
    ],
)
@pytest.mark.parametrize("layers", [1, "all"])
def test_an_architecture_that_does_more_than_its_parts(kind: str, more: dict[str, Any], layers: Any) -> None:
    """Its log-probabilities would be wrong without a word."""
    policy = small(kind, **more)
    with pytest.raises(UserError, match=f"{kind}ForCausalLM does more than its blocks"):
        PPOTrainer(policy, None, liked, None, PROMPTS, PPOParams(value="head", trainable_layers=layers))


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3", "Olmo2"])
@pytest.mark.parametrize("layers", [1, "all"])
def test_architectures_that_work(kind: str, layers: Any) -> None:
    PPOTrainer(small(kind), None, liked, None, PROMPTS, PPOParams(value="head", trainable_layers=layers))


def test_a_window_that_slides_is_the_context() -> None:
    policy = small("Mistral", sliding_window=40)
    with pytest.raises(UserError, match="more than the model's context of 40"):
        PPOTrainer(policy, None, liked, None, PROMPTS, PPOParams(value="head"), max_new_tokens=40)
    PPOTrainer(policy, None, liked, None, PROMPTS, PPOParams(value="head"), max_new_tokens=20)


def small(kind: str, **more: Any) -> Any:
    import transformers

    size = {
        "vocab_size": 330,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**size | more))


def test_models_of_the_wrong_kind(folders: Folders) -> None:
    language, scalar = load_language_model(folders.sft), load_scalar_model(folders.reward)
    params = PPOParams(**SETTINGS)
    for policy, reference, reward, value, message in (
        (scalar, None, liked, scalar, "the policy is a LlamaForSequenceClassification, which is no language model"),
        (language, scalar, liked, scalar, "the reference is a LlamaForSequenceClassification"),
        (language, None, language, scalar, r"LlamaForCausalLM \(.*\) cannot be a reward or value model"),
        (language, None, liked, language, r"LlamaForCausalLM \(.*\) cannot be a reward or value model"),
    ):
        with pytest.raises(UserError, match=message):
            PPOTrainer(policy, reference, reward, value, PROMPTS, params)


def test_texts_that_cannot_become_prompts(folders: Folders) -> None:
    params = PPOParams(**{**SETTINGS, "value": "head"})
    with pytest.raises(UserError, match="prompt 1 is empty"):
        PPOTrainer(
            load_language_model(folders.sft), None, liked, None, ["hello", " "], params,
            tokenizer=load_tokenizer(folders.sft),
        )  # fmt: skip
    with pytest.raises(UserError, match="hand in the tokenizer"):
        PPOTrainer(load_language_model(folders.sft), None, liked, None, ["hello"], params)


def test_a_policy_that_has_no_one_end_token(folders: Folders) -> None:
    policy = load_language_model(folders.sft)
    policy.config.eos_token_id = [1, 2]
    with pytest.raises(UserError, match=r"eos_token_id \[1, 2\]: hand in one token as eos_token"):
        PPOTrainer(policy, None, liked, None, PROMPTS, PPOParams(**{**SETTINGS, "value": "head"}))
    PPOTrainer(policy, None, liked, None, PROMPTS, PPOParams(**{**SETTINGS, "value": "head"}), end_token=2)


def test_texts_go_through_the_chat_template_and_come_back_to_the_reward_as_texts(folders: Folders) -> None:
    seen: list[Any] = []

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        seen.extend(zip(prompts, responses, strict=True))
        return [float(len(response)) for response in responses]

    texts = ["hello dear", "your order is late"]
    params = PPOParams(**{**SETTINGS, "value": "head", "updates": 1})
    trainer = PPOTrainer(
        load_language_model(folders.sft), None, reward, None, texts, params,
        tokenizer=load_tokenizer(folders.sft), max_new_tokens=8,
    )  # fmt: skip
    list(trainer)
    assert trainer.last is not None
    assert [prompt for prompt, _ in seen] == [texts[place] for place in trainer.last.prompts]
    assert [response for _, response in seen] == trainer.responses(trainer.last.rollout)
    assert "<|im_start|>user\nhello dear<|im_end|>" in trainer.tokenizer.decode(trainer.prompts[0])


def test_conversations_go_through_the_chat_template_and_come_back_to_the_reward_as_texts(folders: Folders) -> None:
    seen: set[Any] = set()

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        seen.update(prompts)
        return [float(len(response)) for response in responses]

    params = PPOParams(**{**SETTINGS, "value": "head", "updates": 1})
    tokenizer = load_tokenizer(folders.sft)
    trainer = PPOTrainer(
        load_language_model(folders.sft), None, reward, None, [CONVERSATION, single("hello dear")], params,
        tokenizer=tokenizer, max_new_tokens=8,
    )  # fmt: skip
    list(trainer)
    assert trainer.prompts[0] == tokenizer(IN_CHATML, add_special_tokens=False).input_ids
    assert seen == {"hello dear", text_of(CONVERSATION)}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            [{"role": "human", "content": "hello"}],
            "prompt 0 is no conversation: each turn is a dict with the keys role",
        ),
        ([{"role": "user", "text": "hello"}], "prompt 0 is no conversation"),
        ([{"role": "user", "content": "hello"}, "and"], "prompt 0 is no conversation"),
        ([{"role": "user", "content": " "}], "prompt 0 is empty"),
    ],
)
def test_turns_that_are_none(folders: Folders, prompt: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(folders, [prompt], arguments={"tokenizer": load_tokenizer(folders.sft)})


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if "/tasks/" in frame.f_code.co_filename and name.split(".")[0] in {banned}:
            raise ImportError(f"{{name}} is not part of the trainer")

sys.meta_path.insert(0, Refuse())
from transformers import LlamaConfig, LlamaForCausalLM
from tasks.ppo.params import PPOParams
from tasks.ppo.trainer import PPOTrainer

policy = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, eos_token_id=2, pad_token_id=0))
params = PPOParams(updates=2, batch_size=4, minibatch_size=2, value="head")
reward = lambda prompts, responses: [float(len(response)) for response in responses]
for metrics in PPOTrainer(policy, None, reward, None, [[5, 6], [7]], params, max_new_tokens=4):
    print(sorted(metrics))
"""


def test_the_trainer_alone_needs_torch_transformers_and_accelerate_only(tmp_path: Path) -> None:
    banned = {"prefect", "dvc", "mlflow", "pydantic", "pandas", "trl", "datasets", "peft", "ruamel", "rich", "psutil"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(banned=banned)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("policy_loss") == 2
