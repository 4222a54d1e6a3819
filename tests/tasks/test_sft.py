"""Fine-tuning: the loss is TRL's own, on the response alone; the best epoch is kept; the stage on a tiny model; a run
that is killed goes on and ends with the same bits."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tasks.checkpoints import Checkpoints
from tasks.conversations import single
from tasks.datasets import Demonstration, read_figures, write_rows
from tasks.lineage import load_stages
from tasks.models import (
    encode_prompt,
    encode_response,
    freeze_trunk,
    load_language_model,
    load_tokenizer,
    trunk_depth,
)
from tasks.params import Lora, Sft, load_params
from tasks.sft import _dataset, _trainer_class, run, split_for_validation, train
from tasks.stage import Stage, UserError
from tests.killing import kill_and_finish
from tests.tiny import CONVERSATION, IN_CHATML, give_fingerprint, tiny_model_dir

DEFAULTS = load_params(Path("params.yaml"))
SFT = DEFAULTS.sft.model_copy(
    update={
        "trainable_layers": 1,
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "validation_share": 0.3,
    }
)
ROWS = [
    Demonstration(
        id=f"id{n}",
        prompt=single("hello dear " * (1 + n % 3) + str(n)),
        response=f"we are sorry {'by monday ' * (n % 4)}",
        labeler="ada",
    )
    for n in range(20)
]
ROWS[8] = ROWS[8].model_copy(update={"prompt": CONVERSATION})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("sft") / "base", seed=2)


def example_loss(model: Any, tokenizer: Any, rows: list[Demonstration]) -> float:
    """Mean over the responses' tokens, the end token included, of -log p; one sequence at a time."""
    losses: list[float] = []
    for row in rows:
        prompt, response = encode_prompt(tokenizer, row.prompt), encode_response(tokenizer, row.response)
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        losses += [-logprobs[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]
    return sum(losses) / len(losses)


# ---- split ----


def test_split_is_by_id_and_stable() -> None:
    training, validation = split_for_validation(ROWS, 0.3, 1)
    assert sorted([*training, *validation], key=ROWS.index) == ROWS
    assert training == sorted(training, key=ROWS.index)
    more = [row.model_copy(update={"id": f"new{n}"}) for n, row in enumerate(ROWS)]
    larger_training, larger_validation = split_for_validation([*more, *ROWS[::-1]], 0.3, 1)
    assert {row.id for row in training} <= {row.id for row in larger_training}
    assert {row.id for row in validation} <= {row.id for row in larger_validation}
    assert split_for_validation(ROWS, 0.3, 2)[1] != validation


def test_split_takes_the_share() -> None:
    rows = [ROWS[0].model_copy(update={"id": str(n)}) for n in range(2000)]
    assert len(split_for_validation(rows, 0.1, 1)[1]) / 2000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(("share", "left"), [(0.0, "20 to train on and 0"), (1.0, "0 to train on and 20")])
def test_both_sides_need_a_demonstration(share: float, left: str) -> None:
    with pytest.raises(UserError, match=rf"sft\.validation_share {share} of 20 demonstrations leaves {left}"):
        split_for_validation(ROWS, share, 1)


# ---- loss ----


@pytest.fixture(scope="module")
def trainers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(ours, TRL's own) on the same model and rows. Importing TRL takes seconds."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(base)
    model = load_language_model(base)
    args = SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        report_to="none",
        completion_only_loss=True,
        max_length=None,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    ours, theirs = (
        cls(model=model, args=args, train_dataset=_dataset(ROWS, tokenizer), processing_class=tokenizer)
        for cls in (_trainer_class(), SFTTrainer)
    )
    return ours, theirs


def collate(trainer: Any, rows: slice) -> Any:
    return trainer.data_collator([trainer.train_dataset[n] for n in range(*rows.indices(len(ROWS)))])


@pytest.mark.parametrize("rows", [slice(0, 5), slice(3, 4), slice(6, 20)])
def test_the_loss_is_trls_own(trainers: tuple[Any, Any], rows: slice) -> None:
    ours, theirs = trainers
    model = ours.model.train()
    batch = collate(theirs, rows)
    items = int((batch["labels"] != -100).sum())
    for count in (None, torch.tensor(items), torch.tensor(3 * items)):
        losses, gradients = [], []
        for trainer in (ours, theirs):
            model.zero_grad()
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
            loss.backward()
            losses.append(loss.item())
            gradients.append([weight.grad.clone() for weight in model.parameters()])
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_the_loss_is_on_the_response_and_the_end_token(trainers: tuple[Any, Any], base: Path) -> None:
    ours, _ = trainers
    tokenizer = load_tokenizer(base)
    batch = collate(ours, slice(0, 6))
    for row, labels in zip(ROWS, batch["labels"], strict=False):
        kept = labels[labels != -100].tolist()
        assert kept == encode_response(tokenizer, row.response)
        assert kept[-1] == tokenizer.eos_token_id
    loss = ours.compute_loss(ours.model.eval(), dict(batch)).item()
    assert loss == pytest.approx(example_loss(load_language_model(base), tokenizer, ROWS[:6]), abs=1e-5)


def test_it_gives_the_outputs_where_they_are_asked_for(trainers: tuple[Any, Any]) -> None:
    ours, _ = trainers
    batch = collate(ours, slice(0, 2))
    loss, outputs = ours.compute_loss(ours.model, dict(batch), return_outputs=True)
    assert loss.shape == ()
    assert outputs.logits.shape[0] == 2


# ---- training ----


def run_train(
    base: Path, scratch: Path, tracker: Any = None, **changes: Any
) -> tuple[Any, list[dict[str, float | None]]]:
    training, validation = split_for_validation(ROWS, SFT.validation_share, 1)
    params: Sft = SFT.model_copy(update=changes)
    tracker = tracker or Mock()
    tokenizer = load_tokenizer(base)
    model = load_language_model(base)
    if params.lora is None:
        freeze_trunk(model, trunk_depth(model, params.trainable_layers))
    checkpoints = Checkpoints(scratch / "checkpoints", fingerprint="test")
    return train(model, tokenizer, training, validation, params, 1, tracker, checkpoints, str(scratch))


def test_the_best_epoch_is_kept(base: Path, tmp_path: Path) -> None:
    """The more the model learns to be sorry, the less it expects these validation rows, which are one batch."""
    params = SFT.model_copy(update={"learning_rate": 0.1, "epochs": 6, "batch_size": 2})
    tokenizer = load_tokenizer(base)
    validation = [row.model_copy(update={"response": "hello ticket user"}) for row in ROWS[18:]]
    checkpoints = Checkpoints(tmp_path / "checkpoints", fingerprint="test")
    model, history = train(
        load_language_model(base), tokenizer, ROWS[:18], validation, params, 1, Mock(), checkpoints, str(tmp_path)
    )
    losses = [row["validation_loss"] for row in history if row["validation_loss"] is not None]
    assert len(losses) == 6
    assert min(losses) < losses[-1] - 1e-3, "this test needs a best epoch that is not the last"
    assert example_loss(model, tokenizer, validation) == pytest.approx(min(losses), abs=1e-4)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_lora_gives_a_plain_model(base: Path, tmp_path: Path) -> None:
    model, history = run_train(base, tmp_path, lora=Lora(rank=4, alpha=8), learning_rate=1e-2)
    start = load_language_model(base)
    assert type(model) is type(start)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in start.named_parameters()]
    changed = {
        name
        for (name, weight), old in zip(model.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(weight, old)
    }
    # all linear layers of all blocks, and nothing else
    assert changed == {name for name in names if name.endswith("_proj.weight")}
    losses = [row["validation_loss"] for row in history if row["validation_loss"] is not None]
    _, validation = split_for_validation(ROWS, SFT.validation_share, 1)
    tokenizer = load_tokenizer(base)
    assert example_loss(model, tokenizer, validation) < example_loss(start, tokenizer, validation)
    assert min(losses) < example_loss(start, tokenizer, validation)


# ---- stage ----


def lay_out(root: Path, base: Path) -> Path:
    """The stage's inputs."""
    write_rows(root / "data/collected/demonstrations/demonstrations.jsonl", ROWS)
    give_fingerprint(base, root / "data/collected/demonstrations")
    (root / "data/models").mkdir(parents=True)
    (root / "data/models/base").symlink_to(base)
    return root


def run_stage(root: Path, params: Sft = SFT) -> Mock:
    tracker = Mock()
    stage = Stage(load_stages()["sft"], DEFAULTS.model_copy(update={"sft": params}), tracker, root=root)
    run(stage)
    stage.commit()
    return tracker


@pytest.fixture(scope="module")
def staged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mock]:
    root = tmp_path_factory.mktemp("sft") / "repo"
    return root, run_stage(lay_out(root, base))


def test_the_stage_learns_and_leaves_the_trunk_alone(staged: tuple[Path, Mock], base: Path) -> None:
    root, tracker = staged
    folder = root / "data/models/sft"
    before, after = load_language_model(base), load_language_model(folder)
    for (name, weight), old in zip(after.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(weight, old) != name.startswith(("model.layers.1.", "model.norm.")), name
    training, validation = split_for_validation(ROWS, 0.3, DEFAULTS.seed)
    tokenizer = load_tokenizer(folder)
    assert example_loss(after, tokenizer, validation) < 0.8 * example_loss(before, tokenizer, validation)

    report = read_figures((root / "data/reports/sft/metrics.json").read_text(encoding="utf-8"))["sft"]
    assert set(report) == {"validation_loss", "train_loss", "train_demonstrations", "validation_demonstrations"}
    assert (report["train_demonstrations"], report["validation_demonstrations"]) == (len(training), len(validation))
    with (root / "data/reports/sft/history.csv").open() as file:
        history = list(csv.DictReader(file))
    steps = math.ceil(len(training) / 4) * 2
    assert [int(row["step"]) for row in history if row["loss"]] == list(range(1, steps + 1))
    losses = [float(row["validation_loss"]) for row in history if row["validation_loss"]]
    assert len(losses) == 2
    assert report["validation_loss"] == min(losses)
    logged = [call.args for call in tracker.metrics.call_args_list if "sft/loss" in call.args[0]]
    assert [step for _, step in logged] == list(range(1, steps + 1))
    assert logged[0][0]["sft/loss"] == float(history[0]["loss"])


def test_the_same_bits_twice(staged: tuple[Path, Mock], base: Path, tmp_path: Path) -> None:
    root, _ = staged
    run_stage(lay_out(tmp_path, base))
    outs = [path.relative_to(root) for path in sorted(root.glob("data/models/sft/*"))]
    assert any(path.suffix == ".safetensors" for path in outs)
    assert not any(path.suffix in {".bin", ".pt", ".pth", ".pkl"} for path in outs)
    for path in (*outs, Path("data/reports/sft/metrics.json"), Path("data/reports/sft/history.csv")):
        assert (tmp_path / path).read_bytes() == (root / path).read_bytes(), path


def test_a_conversation_is_trained_on_whole(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    (row,) = _dataset([ROWS[8]], tokenizer)
    text = IN_CHATML + ROWS[8].response + "<|im_end|>"
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False).input_ids
    assert row["completion_mask"].count(1) == len(encode_response(tokenizer, ROWS[8].response))
    assert ROWS[8] in split_for_validation(ROWS, 0.3, DEFAULTS.seed)[0], "the stage's runs train on it"


def test_demonstrations_prepared_for_another_tokenizer(base: Path, tmp_path: Path) -> None:
    lay_out(tmp_path / "repo", base)
    give_fingerprint(
        tiny_model_dir(tmp_path / "other", texts=["other"]), tmp_path / "repo/data/collected/demonstrations"
    )
    with pytest.raises(UserError, match=r"data/collected/demonstrations: \w+, .*data/models/base: .*`dvc repro`"):
        run_stage(tmp_path / "repo")


def test_too_many_trainable_layers(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trainable_layers is 9, and the model has 2 layers"):
        run_stage(lay_out(tmp_path, base), SFT.model_copy(update={"trainable_layers": 9}))


# ---- resuming ----


class Stopped(Exception):
    pass


def stopping_tracker(step: int) -> Mock:
    """Takes metrics up to a step, and there ends the run."""

    def take(_: dict[str, float], at: int) -> None:
        if at >= step:
            raise Stopped

    return Mock(metrics=Mock(side_effect=take))


@pytest.mark.parametrize(
    ("stops", "changes"),
    [
        # three steps an epoch
        ((8, 9), {"checkpoint_every": 4, "epochs": 4}),
        # a checkpoint at the end of an epoch holds its validation, too
        ((5,), {"checkpoint_every": 3, "epochs": 3, "trainable_layers": "all"}),
        # the best epoch is over when it is stopped
        ((14,), {"checkpoint_every": 5, "epochs": 6, "learning_rate": 0.3}),
        ((5,), {"checkpoint_every": 2, "lora": Lora(rank=4, alpha=8)}),
        # more than a hundred steps: the loss is logged as the mean of two, and a checkpoint may stand between them
        ((60,), {"checkpoint_every": 7, "batch_size": 1, "epochs": 11}),
    ],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], stops: tuple[int, ...], changes: dict[str, Any]
) -> None:
    through = Mock()
    expected_model, expected_history = run_train(base, tmp_path / "through", through, **changes)
    for stop in stops:
        with pytest.raises(Stopped):
            run_train(base, tmp_path / "stopped", stopping_tracker(stop), **changes)
    capfd.readouterr()
    tracker = Mock()
    model, history = run_train(base, tmp_path / "stopped", tracker, **changes)
    every = changes["checkpoint_every"]
    at = (max(stops) - 1) // every * every
    assert f"sft: resuming at step {at} of {expected_history[-1]['step']} (checkpoint written" in capfd.readouterr().err
    assert history == expected_history
    assert tracker.metrics.call_args_list == through.metrics.call_args_list, "the new run's curves are complete"
    expected = expected_model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(base: Path, tmp_path: Path) -> None:
    run_train(base, tmp_path, checkpoint_every=3)
    checkpoint = Checkpoints(tmp_path / "checkpoints", fingerprint="test").latest()
    assert checkpoint
    trained = {
        name
        for name, _ in load_language_model(base).named_parameters()
        if name.startswith(("model.layers.1.", "model.norm."))
    }
    kinds: dict[str, set[str]] = {}
    for name in checkpoint.tensors:
        kind, _, rest = name.partition("/")
        kinds.setdefault(kind, set()).add(rest)
    assert kinds["model"] == kinds["best"] == trained
    assert {name.split("/")[1] for name in kinds["optimizer"]} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(kinds["optimizer"]) == 3 * len(trained)
    assert kinds.keys() == {"model", "best", "optimizer", "rng", "loss_since_log"}


KILLED = SFT.model_copy(update={"epochs": 3, "checkpoint_every": 2})  # nine steps


def run_killed_stage(root: Path) -> None:
    run_stage(root, KILLED)


def test_killed_at_any_moment_it_ends_with_the_same_bits(base: Path, tmp_path: Path) -> None:
    kill_and_finish(run_killed_stage, lambda name: lay_out(tmp_path / name, base), "sft", saves=4, seed=1)
