"""params.yaml, typed. One section a stage, and a few that several stages share.

There are no defaults here: params.yaml says everything, so that DVC sees everything that a result depends on. A wrong
or unknown key is an error that names the key and the nearest right one.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tasks.stage import UserError

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
TrainableLayers = Literal["all"] | PositiveInt


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Text(Section):
    """Limits that data, sampling and training share."""

    max_prompt_tokens: PositiveInt  # of the prompt's own text, without the chat template around it
    max_response_tokens: PositiveInt  # with the end token


class Base(Section):
    model: str
    """`wheel:NAME==VERSION` (a pip package that carries a .gguf), `hub:ORG/NAME`, or `folder:PATH`."""
    revision: str | None  # hub only: the commit
    sha256: str | None  # wheel: of the wheel file; folder: of the folder's content as `base` prints it
    chat_template: str | None  # replaces the model's own


class Tickets(Section):
    count: PositiveInt  # distinct prompts to generate


class Splits(Section):
    """Shares of the prompts; they add up to 1."""

    sft: Share
    reward: Share
    ppo: Share
    eval: Share

    @model_validator(mode="after")
    def _add_up(self) -> Splits:
        total = self.sft + self.reward + self.ppo + self.eval
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the shares add up to {total:g}, not to 1")
        return self


class Prepare(Section):
    splits: Splits


Flaw = Literal[
    "no_name",
    "no_order",
    "no_item",
    "no_apology",
    "two_apologies",
    "other_remedy",
    "no_deadline",
    "wrong_deadline",
    "no_signature",
    "padding",
    "empty_promise",
]


class Labeler(Section):
    """A simulated person who demonstrates and ranks: tasks/labels/simulated.py says how each number acts."""

    id: Annotated[str, Field(min_length=1)]
    skill: Share  # the share of demonstrations written with care, that is without flaws
    temperature: NonNegative  # of the Bradley-Terry noise in rankings, in units of utility (0 to 1); 0 is no noise
    just_noticeable: NonNegative  # utilities nearer than this look the same: a tie
    habits: dict[Flaw, NonNegative]  # how many times more often than usual a flaw slips in; 1 where not named


class Demonstrate(Section):
    prompts: PositiveInt


class Lora(Section):
    rank: PositiveInt
    alpha: PositiveInt


class Sft(Section):
    trainable_layers: TrainableLayers
    lora: Lora | None  # instead of training the layers' own weights
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_share: Share
    weight_decay: NonNegative
    validation_share: Share


class Sample(Section):
    prompts: PositiveInt
    responses_per_prompt: Annotated[int, Field(ge=2)]
    temperature: PositiveFloat
    top_p: Annotated[float, Field(gt=0, le=1)]
    batch_size: PositiveInt


class Rank(Section):
    held_out_share: Annotated[float, Field(ge=0, lt=1)]  # of the prompts, kept out of reward training


class Reward(Section):
    trainable_layers: TrainableLayers
    epochs: PositiveInt
    batch_prompts: PositiveInt
    learning_rate: PositiveFloat
    warmup_share: Share
    weight_decay: NonNegative
    centre_on: PositiveInt  # demonstrations whose mean score becomes 0


class Ppo(Section):
    trainable_layers: TrainableLayers
    updates: PositiveInt
    batch_size: PositiveInt  # episodes an update
    samples_per_prompt: PositiveInt
    minibatch_size: PositiveInt  # episodes an optimizer step
    micro_batch_size: PositiveInt  # episodes a forward pass; memory, not results, depends on it
    epochs: PositiveInt
    learning_rate: PositiveFloat
    value_learning_rate: PositiveFloat
    schedule: Literal["constant", "linear", "cosine"]  # of both learning rates, over all optimizer steps
    warmup_share: Share  # of these steps, from 0 up to the rate
    adam_betas: tuple[Share, Share]
    adam_eps: PositiveFloat
    value_warmup_epochs: Annotated[int, Field(ge=0)]  # over the first episodes, before the policy moves
    temperature: PositiveFloat
    top_p: Annotated[float, Field(gt=0, le=1)]
    kl_coef: NonNegative
    kl_estimator: Literal["k1", "k3"]
    kl_target: PositiveFloat | None  # nats a response: the adaptive controller steers kl_coef towards it
    kl_horizon: PositiveInt  # episodes
    gamma: Share
    gae_lambda: Share
    whiten_advantages: bool
    whiten_rewards: bool  # the variance, not the mean
    clip_range: PositiveFloat
    value_clip_range: PositiveFloat
    max_grad_norm: PositiveFloat
    normalise_scores: bool  # by the running mean and standard deviation
    score_clip: PositiveFloat | None
    missing_end_score: float | None  # replaces the score of a response that does not end
    missing_end_penalty: NonNegative  # taken off it where it is not replaced


class Evaluate(Section):
    prompts: Annotated[int, Field(ge=2)]
    temperature: PositiveFloat
    batch_size: PositiveInt
    bootstrap_samples: PositiveInt


class Register(Section):
    alias: str


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    text: Text
    base: Base
    tickets: Tickets
    prepare: Prepare
    labelers: Annotated[list[Labeler], Field(min_length=1)]
    demonstrate: Demonstrate
    sft: Sft
    sample: Sample
    rank: Rank
    reward: Reward
    ppo: Ppo
    evaluate: Evaluate
    register_: Register = Field(alias="register")

    @field_validator("labelers")
    @classmethod
    def _distinct(cls, labelers: list[Labeler]) -> list[Labeler]:
        if len({labeler.id for labeler in labelers}) < len(labelers):
            raise ValueError("two labelers have the same id")
        return labelers


def load_params(path: Path) -> Params:
    """Read and check params.yaml; UserError names each wrong key."""
    try:
        raw = YAML(typ="safe").load(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the repository's root.") from None
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections such as `ppo:`, and holds {type(raw).__name__}.")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise UserError(f"{path}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(problem: Any) -> str:
    """One line for one wrong key: where, what, and for an unknown one the nearest right one."""
    where = [str(part) for part in problem["loc"]]
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        known = _keys_of(where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return f"unknown key `{key}`; {hint}"
    if problem["type"] == "missing":
        return f"key `{key}` is missing"
    return f"`{key}`: {problem['msg']} (it is {problem['input']!r})"


def _keys_of(section: list[str]) -> list[str]:
    """The keys that the schema knows at a place."""
    model: Any = Params
    for part in section:
        if part.isdigit():  # a place in a list: what the list holds
            model = next(iter(get_args(model)), None)
        else:
            model = {(field.alias or name): field.annotation for name, field in model.model_fields.items()}.get(part)
        if get_origin(model) is list:
            continue
        # of an optional section, the section
        model = next((kind for kind in get_args(model) if hasattr(kind, "model_fields")), model)
        if not hasattr(model, "model_fields"):
            return []
    return [field.alias or name for name, field in model.model_fields.items()]
