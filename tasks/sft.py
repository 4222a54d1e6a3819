"""Stage `sft`: fine-tune the base model on the demonstrations (InstructGPT, step 1).

`python -m tasks.run sft`. TRL's SFTTrainer does the training; the loss is on the response alone, the end token
included. The epoch with the lowest validation loss is kept. A run that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.checkpoints import (
    Checkpoint,
    Checkpoints,
    load_optimizer_state,
    nest,
    optimizer_state,
    pick,
    restore_rng,
    rng_state,
)
from tasks.datasets import Demonstration, read_rows, write_csv, write_figures, write_json
from tasks.demands import require, validation_sides
from tasks.models import (
    encode_prompt,
    encode_response,
    freeze_trunk,
    load_language_model,
    load_tokenizer,
    require_same_tokenizer,
    save_model,
    trunk_depth,
)
from tasks.stage import Stage

if TYPE_CHECKING:
    from tasks.params import Sft

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run(stage: Stage) -> None:
    params = stage.params.sft
    base = stage.dep("data/models/base")
    collected = stage.dep("data/collected/demonstrations")
    require_same_tokenizer(collected, base)
    demonstrations = read_rows(collected / "demonstrations.jsonl", Demonstration)
    tokenizer = load_tokenizer(base)
    training, validation = split_for_validation(demonstrations, params.validation_share, stage.params.seed)
    model = load_language_model(base)
    if params.lora is None:
        freeze_trunk(model, trunk_depth(model, params.trainable_layers))

    with tempfile.TemporaryDirectory() as scratch:
        model, history = train(
            model, tokenizer, training, validation, params, stage.params.seed, stage.tracker, stage.checkpoints, scratch
        )

    save_model(model, tokenizer, stage.out("data/models/sft"))
    write_csv(stage.out("data/reports/sft/history.csv"), history)
    best = min(row["validation_loss"] for row in history if row["validation_loss"] is not None)
    report = {
        "validation_loss": best,
        "train_loss": [row["loss"] for row in history if row["loss"] is not None][-1],
        "train_demonstrations": len(training),
        "validation_demonstrations": len(validation),
    }
    write_figures(stage.out("data/reports/sft/metrics.json"), {"sft": report}, ["sft.validation_loss"])


def split_for_validation(
    demonstrations: list[Demonstration], share: float, seed: int
) -> tuple[list[Demonstration], list[Demonstration]]:
    """(training, validation) by a hash of the prompt's id, so that new demonstrations move no old one."""

    draws = [validation_draw(seed, row.id) for row in demonstrations]
    require(validation_sides(share, draws))
    validation = [row for row, draw in zip(demonstrations, draws, strict=True) if draw < share]
    training = [row for row, draw in zip(demonstrations, draws, strict=True) if draw >= share]
    return training, validation


def validation_draw(seed: int, id: str) -> float:
    return int(hashlib.sha256(f"sft validation {seed} {id}".encode()).hexdigest()[:12], 16) / 16**12


def train(
    model: Any,
    tokenizer: Any,
    training: list[Demonstration],
    validation: list[Demonstration],
    params: Sft,
    seed: int,
    tracker: Any,
    checkpoints: Checkpoints,
    scratch: str,
) -> tuple[Any, list[dict[str, float | None]]]:
    """The model with the best epoch's weights, and the loss curve: rows of step, epoch, loss, validation_loss."""
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig

    steps = math.ceil(len(training) / params.batch_size) * params.epochs
    config = SFTConfig(
        output_dir=scratch,
        save_strategy="no",  # `record` says when
        report_to="none",
        eval_strategy="epoch",
        logging_steps=max(1, steps // 50),
        disable_tqdm=True,
        num_train_epochs=params.epochs,
        per_device_train_batch_size=params.batch_size,
        per_device_eval_batch_size=params.batch_size,
        learning_rate=params.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(steps * params.warmup_share),
        weight_decay=params.weight_decay,
        completion_only_loss=True,
        max_length=None,
        seed=seed,
        data_seed=seed,
        use_cpu=not _has_gpu(),
        activation_checkpointing=False,
        bf16=False,
        dataloader_pin_memory=False,
    )
    record = _record_callback(tracker, params.checkpoint_every)
    trainer = _trainer_class()(
        model=model,
        args=config,
        train_dataset=_dataset(training, tokenizer),
        eval_dataset=_dataset(validation, tokenizer),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=params.lora.rank, lora_alpha=params.lora.alpha, target_modules="all-linear")
        if params.lora
        else None,
        callbacks=[record],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=trainer.resume(checkpoints, record))
    record.restore_best(trainer.model)
    trained = trainer.model.merge_and_unload() if params.lora else trainer.model
    return trained.requires_grad_(False).eval(), record.history


def _trainer_class() -> Any:
    """TRL's SFTTrainer with a leaner loss, and checkpoints without pickles; made in a function because importing TRL
    takes ten seconds."""
    import torch.nn.functional as F
    from trl import SFTTrainer

    class CompletionTrainer(SFTTrainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """TRL's own loss works out entropy and top-1 accuracy of every token as well: over a vocabulary of 49k that
            doubles the time of a step on a CPU. The loss is the same number (tests/tasks/test_sft.py)."""
            labels = inputs.pop("labels")  # (B, T), -100 where there is no loss
            kept = labels != -100
            first = int(kept.any(0).nonzero()[0])
            outputs = model(**inputs, use_cache=False, logits_to_keep=labels.shape[1] - first + 1)
            logits = outputs.logits[:, :-1]  # the logits at t predict the token at t + 1
            total = F.cross_entropy(logits.flatten(0, 1), labels[:, first:].flatten(), reduction="sum")
            loss = total / (kept.sum() if num_items_in_batch is None else num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

        # Transformers finds its place in the data by itself; all else it would pickle. What follows stands in for that.

        def resume(self, checkpoints: Checkpoints, record: Any) -> str | None:
            """What `train` takes as resume_from_checkpoint: a folder with the trainer's own state alone, JSON; or None
            where there is nothing to resume from."""
            self.checkpoints, self.record = checkpoints, record
            checkpoint = checkpoints.latest()
            if checkpoint is None:
                return None
            self.checkpoint = checkpoint
            checkpoint.announce("sft", "step", checkpoint.facts["trainer"]["max_steps"])
            record.restore(checkpoint)
            folder = Path(self.args.output_dir) / "resume"
            write_json(folder / "trainer_state.json", checkpoint.facts["trainer"])
            return str(folder)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            optimizer, optimizer_facts = optimizer_state(self.optimizer)
            rng, rng_facts = rng_state()
            tensors = {
                **nest("model", _trained(self.model)),
                **nest("best", self.record.best),
                **nest("optimizer", optimizer),
                **nest("rng", rng),
                "loss_since_log": self._tr_loss,
            }
            facts = {
                "optimizer": optimizer_facts,
                "rng": rng_facts,
                "schedule": self.lr_scheduler.state_dict(),
                "trainer": dataclasses.asdict(self.state),
                "last_log": self._globalstep_last_logged,
                "history": self.record.history,
                "logged": self.record.logged,
            }
            self.checkpoints.save(self.state.global_step, tensors, facts)

        def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
            self.model.load_state_dict(pick("model", self.checkpoint.tensors), strict=False)

        def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
            tensors, facts = pick("optimizer", self.checkpoint.tensors), self.checkpoint.facts
            load_optimizer_state(self.optimizer, tensors, facts["optimizer"])
            self.lr_scheduler.load_state_dict(facts["schedule"])

        def _load_rng_state(self, folder: str | None) -> None:
            """Called before the first step. The loop has set to 0 the loss since the last log; that comes back too."""
            restore_rng(pick("rng", self.checkpoint.tensors), self.checkpoint.facts["rng"])
            self._tr_loss.copy_(self.checkpoint.tensors["loss_since_log"])
            self._globalstep_last_logged = self.checkpoint.facts["last_log"]

    return CompletionTrainer


def _trained(model: Any) -> dict[str, Any]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _dataset(rows: list[Demonstration], tokenizer: Any) -> Any:
    """Tokenized here, not by TRL, so that every stage reads a prompt and a response in one way."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    responses = [encode_response(tokenizer, row.response) for row in rows]
    return Dataset.from_dict(
        {
            "input_ids": [prompt + response for prompt, response in zip(prompts, responses, strict=True)],
            "completion_mask": [[0] * len(p) + [1] * len(r) for p, r in zip(prompts, responses, strict=True)],
        }
    )


def _record_callback(tracker: Any, checkpoint_every: int) -> Any:
    """A trainer callback: progress bar, loss curve, metrics to the tracker, the best epoch's weights in memory, and
    when a checkpoint is due."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Record(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.history: list[dict[str, float | None]] = []
            self.logged: list[tuple[dict[str, float], int]] = []
            self.best_loss = math.inf
            self.best: dict[str, Any] = {}

        def restore(self, checkpoint: Checkpoint) -> None:
            """As it was at a checkpoint; what was logged until then is logged again, to this run."""
            self.history = checkpoint.facts["history"]
            losses = [row["validation_loss"] for row in self.history if row["validation_loss"] is not None]
            self.best_loss = min(losses, default=math.inf)
            self.best = pick("best", checkpoint.tensors)
            for values, step in checkpoint.facts["logged"]:
                self._log(values, step)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="sft", unit="step")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update()
            # at the end of an epoch after its validation, not before: resuming would leave that out
            ends_epoch = state.global_step % (state.max_steps // args.num_train_epochs) == 0
            control.should_save = self._is_due(state) and not ends_epoch

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = self._is_due(state)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.3f}")
                self._add(state, loss=logs["loss"], validation_loss=None)
                self._log({"sft/loss": logs["loss"], "sft/learning_rate": logs["learning_rate"]}, state.global_step)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            loss = metrics["eval_loss"]
            self._add(state, loss=None, validation_loss=loss)
            self._log({"sft/validation_loss": loss}, state.global_step)
            if loss < self.best_loss:
                self.best_loss = loss
                self.best = {name: weight.detach().clone() for name, weight in _trained(kwargs["model"]).items()}

        def _is_due(self, state: Any) -> bool:
            return bool(state.global_step % checkpoint_every == 0)

        def _log(self, values: dict[str, float], step: int) -> None:
            self.logged.append((values, step))
            tracker.metrics(values, step)

        def _add(self, state: Any, **losses: float | None) -> None:
            self.history.append({"step": state.global_step, "epoch": round(state.epoch, 4), **losses})

        def restore_best(self, model: Any) -> None:
            model.load_state_dict(self.best, strict=False)

    return Record()
