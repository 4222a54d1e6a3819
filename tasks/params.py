"""params.yaml, typed. One section a stage, and a few that several stages share.

There are no defaults here: params.yaml says everything, so that DVC sees everything that a result depends on. A wrong
or unknown key is an error that names the key and the nearest right one.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tasks.ppo.params import PPOParams
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
    duplicate_limit: Share  # of the rows; more of them is a failed check


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
    checkpoint_every: PositiveInt  # optimizer steps


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
    checkpoint_every: PositiveInt  # optimizer steps


@dataclass(frozen=True, kw_only=True)
class Ppo(PPOParams):
    """The trainer's own, and what the stage needs beside them. All of them stand in params.yaml."""

    rewards: dict[str, FiniteFloat] = field(default_factory=lambda: {"model": 1.0})
    """{what: weight}. `model` is the reward model; `FILE.py:FUNCTION` is (prompts, responses) -> scores, of texts."""
    sample_every: PositiveInt = 4  # updates between tables of sample texts in MLflow
    checkpoint_every: PositiveInt = 2  # updates


class Evaluate(Section):
    prompts: Annotated[int, Field(ge=2)]
    temperature: PositiveFloat
    batch_size: PositiveInt
    bootstrap_samples: PositiveInt


class Gates(Section):
    """Limits that a policy must keep to become the champion; null: not asked. tasks/gates.py says what is measured."""

    failed_data_checks: Annotated[int, Field(ge=0)] | None  # of `prepare`, at most
    reward_accuracy: Share | None  # of the reward model on held-out pairs, at least
    reward_calibration_error: Share | None  # expected calibration error on the same, at most
    win_rate_low: Share | None  # lower end of the 95 % interval of the win rate over the SFT model, at least
    champion_win_rate_low: Share | None  # the same over the champion; not asked while there is none
    kl: NonNegative | None  # nats a response from the SFT model, at most
    fluency_loss: (
        NonNegative | None
    )  # nats a token that the base model finds it less likely than the SFT model's, at most
    length_ratio_low: NonNegative | None  # mean length over the SFT model's, at least
    length_ratio_high: NonNegative | None  # and at most
    ended: Share | None  # of the answers that end by themselves, at least


class Register(Section):
    approval: bool  # a person says yes before a policy that passed all gates becomes the champion
    gates: Gates


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
    # the trainer's parameters have defaults for those who use it alone; here the file says everything
    ppo = raw.get("ppo")
    wrong = [f"key `ppo.{one.name}` is missing" for one in fields(Ppo) if isinstance(ppo, dict) and one.name not in ppo]
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        wrong = [_explain(problem) for problem in error.errors()] + wrong
    if wrong:
        raise UserError(f"{path}:\n" + "\n".join(f"  {line}" for line in wrong))
    return params


def _explain(problem: Any) -> str:
    """One line for one wrong key: where, what, and for an unknown one the nearest right one."""
    where = [str(part) for part in problem["loc"]]
    key = ".".join(where)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_of(where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return f"unknown key `{key}`; {hint}"
    if problem["type"] == "missing":
        return f"key `{key}` is missing"
    if problem["type"] == "value_error":  # of a whole section, and names what is wrong in it
        return f"`{key}`: {problem['ctx']['error']}"
    return f"`{key}`: {problem['msg']} (it is {problem['input']!r})"


def _keys_of(section: list[str]) -> list[str]:
    """The keys that the schema knows at a place."""
    model: Any = Params
    for part in section:
        # a place in a list: what the list holds
        model = next(iter(get_args(model)), None) if part.isdigit() else _kinds(model).get(part)
        if get_origin(model) is list:
            continue
        # of an optional section, the section
        model = next((kind for kind in get_args(model) if _kinds(kind)), model)
    return list(_kinds(model))


def _kinds(section: Any) -> dict[str, Any]:
    """{key: type} of a section; empty where it is none."""
    if is_dataclass(section):
        return {one.name: one.type for one in fields(section)}
    known = getattr(section, "model_fields", {})
    return {(one.alias or name): one.annotation for name, one in known.items()}
