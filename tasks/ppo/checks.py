"""What can be known to be wrong before the first update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from transformers import PreTrainedModel

from tasks.conversations import Role
from tasks.demands import lacks_prompts
from tasks.models import context_of
from tasks.ppo.params import PPOParams
from tasks.ppo.ptx import Text
from tasks.stage import UserError


def special_token(policy: PreTrainedModel, name: str, given: int | None) -> int:
    """A token's id: the given one, or else the policy's own."""
    token = getattr(policy.config, name, None) if given is None else given
    if not isinstance(token, int):
        raise UserError(f"the policy's config has {name} {token!r}: hand in one token as {name.removesuffix('_id')}.")
    return token


def texts(prompts: Sequence[Any], tokenizer: Any) -> None:
    """UserError for texts that cannot become tokens, or that a chat template would make look like something."""
    for place, prompt in enumerate(prompts):
        if not is_text(prompt):
            continue
        if tokenizer is None:
            raise UserError("prompts are texts: hand in the tokenizer that goes with the policy, or token ids.")
        if is_conversation(prompt) and not all(map(is_turn, prompt)):
            raise UserError(
                f"PPO cannot start: prompt {place} is no conversation: each turn is a dict with the keys role (one of "
                f"{', '.join(get_args(Role))}) and content, a text."
            )
        said = prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt)
        if not said.strip():
            raise UserError(f"PPO cannot start: prompt {place} is empty.")


def is_text(prompt: Any) -> bool:
    """Whether it becomes tokens by the chat template: a text or a conversation, not token ids."""
    return isinstance(prompt, str) or is_conversation(prompt)


def is_conversation(prompt: Any) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") in get_args(Role) and isinstance(turn.get("content"), str)


def check(*problems: Iterator[str]) -> None:
    """UserError that tells them all, or the first five."""
    found = [problem for some in problems for problem in some]
    if found:
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        raise UserError("PPO cannot start: " + "; ".join(found[:5]) + more + ".")


def of_kinds(policy: PreTrainedModel, reference: Any, scalars: Sequence[Any]) -> Iterator[str]:
    """Language models have a vocabulary head, and reward and value models give one number."""
    for name, model in (("policy", policy), ("reference", reference)):
        if model is not None and not hasattr(model, "lm_head"):
            yield f"the {name} is a {type(model).__name__}, which is no language model"
    for model in scalars:
        if isinstance(model, PreTrainedModel) and getattr(getattr(model, "score", None), "out_features", None) != 1:
            yield (
                f"{type(model).__name__} ({model.name_or_path}) cannot be a reward or value model: those are sequence "
                "classifiers with num_labels=1"
            )


def of_models(policy: PreTrainedModel, others: Sequence[Any]) -> Iterator[str]:
    for model in (policy, *others):
        if not isinstance(model, PreTrainedModel):
            continue
        if not hasattr(getattr(model, "model", None), "layers"):
            yield f"{type(model).__name__} has no `model.layers`: it cannot be split into trunk and branch"
        if model.config.vocab_size != policy.config.vocab_size:
            yield (
                f"{type(model).__name__} ({model.name_or_path}) reads {model.config.vocab_size} tokens and the policy "
                f"{policy.config.vocab_size}: they have different tokenizers. Train them from one base"
            )


def of_prompts(
    policy: PreTrainedModel, prompts: Sequence[list[int]], params: PPOParams, max_new_tokens: int
) -> Iterator[str]:
    context = context_of(policy.config)
    if lack := lacks_prompts(len(prompts), params.eval_every, params.eval_prompts):
        yield lack
    for place, prompt in enumerate(prompts):
        if not prompt:
            yield f"prompt {place} is empty"
        elif len(prompt) + max_new_tokens > context:
            yield (
                f"prompt {place} has {len(prompt)} tokens, and with {max_new_tokens} of a response that is more than "
                f"the model's context of {context}"
            )
        elif not all(0 <= token < policy.config.vocab_size for token in prompt):
            yield f"prompt {place} has a token that is not in the vocabulary of {policy.config.vocab_size}"


def of_params(
    params: PPOParams, value_model: Any, pretraining: Sequence[Text], end_token: int, pad_token: int, processes: int
) -> Iterator[str]:
    """What fits badly with the rest of what was handed in."""
    if end_token == pad_token:
        yield f"end and padding are one token, {end_token}: masks could not tell them apart"
    if params.value == "separate" and value_model is None:
        yield 'a value model is missing: hand in the reward model, say, or set value to "head"'
    if params.value == "head" and value_model is not None:
        yield 'a value model was handed in, and value is "head"'
    if params.ptx_coef and not pretraining:
        yield f"ptx_coef is {params.ptx_coef:g}, and no pretraining texts were handed in"
    if any(not text.given or not text.predicted for text in pretraining):
        yield "a pretraining text is empty: each needs a token that is given and one that is predicted"
    if params.batch_size % (processes * params.samples_per_prompt):
        yield (
            f"batch_size {params.batch_size} does not divide over {processes} processes with "
            f"{params.samples_per_prompt} samples a prompt"
        )
