"""The trainer's parameters, each with its range.

KL coefficient, clip range, gamma and Adam's betas default to InstructGPT's (Ouyang et al. 2022); learning rates and
lambda to those of Huang et al. 2024 ("The N+ implementation details of RLHF with PPO", 2403.17031).

A plain dataclass, so that the trainer needs no library for it; tasks/params.py reads the same class from params.yaml.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints


def _within(
    default: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A parameter that must be > above, >= least, <= most and < below."""
    return field(default=default, metadata={"above": above, "least": least, "most": most, "below": below})


def _positive(default: Any) -> Any:
    return _within(default, above=0)


def _not_negative(default: Any) -> Any:
    return _within(default, least=0)


def _share(default: Any) -> Any:
    return _within(default, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class PPOParams:
    """ValueError names every parameter that is out of range, or that does not fit another."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    # what is trained, on how much
    trainable_layers: Literal["all"] | int = _within("all", least=1)  # the top N blocks, or all
    value: Literal["separate", "head"] = "separate"  # a model of its own, or a head on the policy's
    updates: int = _positive(1000)
    batch_size: int = _positive(64)  # episodes an update, over all processes
    samples_per_prompt: int = _positive(1)
    minibatch_size: int = _positive(64)  # episodes an optimizer step, over all processes
    micro_batch_size: int = _positive(16)  # episodes a forward pass; memory, not results, depends on it
    epochs: int = _positive(1)
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward passes; weights and optimizers stay fp32

    # the optimizers
    learning_rate: float = _positive(3e-6)
    value_learning_rate: float = _positive(3e-6)
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of both rates, over all optimizer steps
    warmup_share: float = _share(0.0)  # of these steps, from 0 up to the rate
    adam_betas: tuple[float, float] = _within((0.9, 0.95), least=0, below=1)
    adam_eps: float = _positive(1e-8)
    max_grad_norm: float = _positive(1.0)
    value_warmup_epochs: int = _not_negative(0)  # over the first episodes, before the policy moves
    ema_decay: float | None = _within(None, above=0, most=1)  # an optimizer step; then the average is what is kept

    # sampling
    temperature: float = _positive(1.0)
    top_p: float = _within(1.0, above=0, most=1)

    # from scores to rewards
    kl_coef: float = _not_negative(0.02)
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_target: float | None = _positive(None)  # nats a response: the adaptive controller steers kl_coef towards it
    kl_horizon: int = _positive(10000)  # episodes
    normalise_scores: bool = False  # by the running mean and standard deviation
    score_clip: float | None = _positive(None)
    missing_end_score: float | None = None  # replaces the score of a response that does not end
    missing_end_penalty: float = _not_negative(0.0)  # taken off it where it is not replaced
    whiten_rewards: bool = False  # the variance, not the mean

    # from rewards to losses
    gamma: float = _share(1.0)
    gae_lambda: float = _share(0.95)
    whiten_advantages: bool = True
    clip_range: float = _positive(0.2)
    value_clip_range: float = _positive(0.2)
    value_coef: float = _positive(1.0)  # of the value loss beside the policy's
    ptx_coef: float = _not_negative(0.0)  # of the language-model loss: PPO-ptx, in the paper 27.8
    ptx_examples_per_episode: int = _positive(8)

    # held-out evaluation, and when to stop
    eval_every: int = _not_negative(0)  # updates; 0 is never
    eval_prompts: int = _positive(32)  # kept out of training
    kl_limit: float | None = _positive(None)  # nats a response
    entropy_floor: float | None = _positive(None)  # nats a token
    patience: int | None = _positive(None)  # evaluations without a better held-out score

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        given = [(one, getattr(self, one.name)) for one in fields(self)]
        wrong = [
            f"{one.name} is {value!r}, and must be {describe_type(hints[one.name])}"
            for one, value in given
            if not has_type(value, hints[one.name])
        ]
        wrong = wrong or [text for one, value in given for text in _out_of_range(one.name, value, one.metadata)]
        wrong = wrong or list(self._misfits())
        if wrong:
            raise ValueError("; ".join(wrong))

    def _misfits(self) -> list[str]:
        """What is wrong with one parameter beside another."""
        wrong = []
        for name in ("batch_size", "minibatch_size", "micro_batch_size"):
            if getattr(self, name) % self.samples_per_prompt:
                wrong.append(
                    f"{name} {getattr(self, name)} is not a multiple of samples_per_prompt {self.samples_per_prompt}: "
                    "the samples of a prompt go through together"
                )
        if self.batch_size % self.minibatch_size:
            wrong.append(f"batch_size {self.batch_size} does not divide into minibatches of {self.minibatch_size}")
        if self.patience is not None and not self.eval_every:
            wrong.append("patience counts held-out evaluations, and eval_every is 0: there are none")
        return wrong


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value has a type: numbers, texts, None, choices, and tuples and dictionaries of them. A whole number is
    a number; true and false are none."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in parts
    if kind in (Union, UnionType):
        return any(has_type(value, part) for part in parts)
    if kind is tuple:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(has_type, value, parts))
    if kind is dict:
        return isinstance(value, dict) and all(
            has_type(key, parts[0]) and has_type(value[key], parts[1]) for key in value
        )
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float if hint is float else kind or hint)


def describe_type(hint: Any) -> str:
    """A type in words, such as "a number or None"."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(repr, parts))
    if kind in (Union, UnionType):
        return " or ".join(map(describe_type, parts))
    if kind is tuple:
        return f"{len(parts)} values, each {describe_type(parts[0])}"
    if kind is dict:
        return f"names, each with {describe_type(parts[1])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "None"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _out_of_range(name: str, value: Any, limits: Any) -> list[str]:
    wrong = []
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if not math.isfinite(number):
            wrong.append(f"{name} is {number}, not a finite number")
        elif limits.get("above") is not None and not number > limits["above"]:
            wrong.append(f"{name} is {number}, and must be above {limits['above']}")
        elif limits.get("least") is not None and number < limits["least"]:
            wrong.append(f"{name} is {number}, and must be at least {limits['least']}")
        elif limits.get("most") is not None and number > limits["most"]:
            wrong.append(f"{name} is {number}, and must be at most {limits['most']}")
        elif limits.get("below") is not None and not number < limits["below"]:
            wrong.append(f"{name} is {number}, and must be below {limits['below']}")
    return wrong
