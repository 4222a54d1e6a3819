"""Early stops, and which update's policy is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.ppo.batch import Batch
from tasks.ppo.params import PPOParams
from tasks.ppo.stopping import HeldOut, Watch
from tests.tasks.ppo.toy import Folders, liked, make_trainer, trained_weights, without_times


def watch(**changes: Any) -> Watch:
    return Watch(PPOParams(**{"eval_every": 1, **changes}))


def held_out(update: int, score: float, kl: float = 0.0) -> HeldOut:
    """Of four prompts, all scored alike."""
    return HeldOut(update, [score] * 4, kl)


def test_a_later_policy_is_kept_within_the_kl_limit() -> None:
    one = watch(kl_limit=10.0)
    results = [held_out(0, 1.0), held_out(1, 3.0, 9.9), held_out(2, 5.0, 10.1), held_out(3, 2.0, 5.0)]
    assert [one.evaluated(result) for result in results] == [True, True, False, False]
    assert one.kept == one.best == results[1]
    assert one.stopped is None


def test_the_sign_test_by_hand() -> None:
    start = HeldOut(0, [0.0] * 32, 0.0)

    def beats(wins: int, losses: int) -> bool:
        return HeldOut(1, [1.0] * wins + [-1.0] * losses + [0.0] * (32 - wins - losses), 0.0).beats(start)

    assert beats(22, 10)  # 12 > 1.96 * 32 ** 0.5 = 11.1
    assert not beats(21, 11)  # 10
    assert beats(4, 0)  # 4 > 3.92: prompts with the same score say nothing
    assert not beats(3, 0)
    assert not beats(0, 32)


def test_a_higher_mean_alone_is_not_enough() -> None:
    """The reward model likes one answer very much: the best mean, and yet most prompts are as before."""
    one = watch()
    start, hacked = held_out(0, 1.0), HeldOut(1, [1.0, 1.0, 1.0, 99.0], 5.0)
    assert [one.evaluated(result) for result in (start, hacked)] == [True, False]
    assert (one.kept, one.best) == (start, hacked)


def test_small_gains_add_up() -> None:
    """Each is held against the one that is kept, not against the one before."""
    one = watch()
    steps = [[float(place < gained) for place in range(8)] for gained in (0, 2, 4, 6)]
    kept = [one.evaluated(HeldOut(update, scores, 0.0)) for update, scores in enumerate(steps)]
    assert kept == [True, False, True, False]  # 2 > 2.8; 4 > 3.9; then 2 > 2.8 over the kept one


def test_patience_by_hand() -> None:
    one = watch(patience=2)
    for update, score in enumerate([1.0, 2.0, 1.9, 2.1, 2.0]):
        one.evaluated(held_out(update, score))
        assert one.stopped is None
    one.evaluated(held_out(5, 2.1))
    assert one.stopped == "the held-out score has not improved in 2 evaluations (best: 2.1 at update 3)"


def test_kl_and_entropy_limits_and_the_first_reason_stays() -> None:
    one = watch(kl_limit=10.0, entropy_floor=0.5)
    one.sampled(3, 10.0, 0.5)
    assert one.stopped is None
    one.sampled(4, 10.5, 0.1)
    assert one.stopped == "KL 10.5 nats a response at update 4 is above kl_limit 10"
    one.sampled(5, 1.0, 0.1)
    assert one.stopped == "KL 10.5 nats a response at update 4 is above kl_limit 10"
    other = watch(entropy_floor=0.5)
    other.sampled(2, 99.0, 0.4)
    assert other.stopped == "entropy 0.4 nats a token at update 2 is below entropy_floor 0.5"


def test_state_round_trip() -> None:
    one, other = watch(patience=3), watch(patience=3)
    for result in (held_out(0, 1.0), held_out(1, 0.5, 0.1)):
        one.evaluated(result)
    other.load_state(json.loads(json.dumps(one.state())))
    assert (other.kept, other.best, other.stopped, other.without_gain) == (held_out(0, 1.0), held_out(0, 1.0), None, 1)


# ---- in the trainer ----


def test_a_policy_that_goes_too_far_is_rolled_back(folders: Folders) -> None:
    """A huge rate: the KL passes the limit, training stops there, and the best policy within the limit is kept."""
    trainer = make_trainer(folders, updates=20, learning_rate=0.03, eval_every=1, eval_prompts=2, kl_limit=1.5)
    history = list(trainer)
    assert len(history) < 20
    assert trainer.watch.stopped == (
        f"KL {history[-1]['kl']:.4g} nats a response at update {len(history)} is above kl_limit 1.5"
    )
    assert "policy_loss" not in history[-1], "nothing was learned from these episodes"
    kept = trainer.watch.kept
    assert kept is not None
    assert trainer.kept_update == kept.update < trainer.update
    again = trainer.evaluate()
    assert (again.scores, again.kl) == (kept.scores, kept.kl), "the weights are those"


def test_the_kept_update_is_put_in_its_place_at_the_end(folders: Folders) -> None:
    trainer = make_trainer(folders, updates=8, learning_rate=0.02, eval_every=1, eval_prompts=4)
    for _ in trainer:
        pass
    assert trainer.watch.kept is not None
    assert 0 < trainer.watch.kept.update < trainer.update == 8, "or the test shows nothing"
    assert trainer.kept_update == trainer.watch.kept.update
    assert trainer.evaluate().scores == trainer.watch.kept.scores


def test_held_out_prompts_are_not_trained_on(folders: Folders) -> None:
    trainer = make_trainer(folders, eval_every=1, eval_prompts=2)
    assert len(trainer.held_out) == 2
    assert sorted(trainer.order + trainer.held_out) == [0, 1, 2, 3, 4, 5]
    sampled = {place for update in range(4) for place in trainer.sample(update)[1]}
    assert sampled == set(trainer.order)


def test_a_missing_end_counts_on_held_out_prompts_too(folders: Folders) -> None:
    options: dict[str, Any] = {"eval_every": 1, "eval_prompts": 5}
    plain = make_trainer(folders, missing_end_score=None, **options).evaluate()
    marked = make_trainer(folders, missing_end_score=-50.0, **options).evaluate()
    assert marked.score < plain.score - 5
    assert marked.kl == plain.kl == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("eval_every", [0, 1])
def test_a_loss_that_is_not_finite_stops_and_leaves_good_weights(folders: Folders, eval_every: int) -> None:
    trainer = make_trainer(folders, updates=5, eval_every=eval_every, eval_prompts=2)
    train = trainer.train_minibatch

    def spoilt(batch: Batch, rows: Tensor) -> dict[str, float]:
        return train(batch._replace(advantages=batch.advantages * float("inf")), rows)

    seen = []
    for metrics in trainer:
        seen.append(metrics)
        if trainer.update == 2:
            before = trained_weights(trainer)
            trainer.train_minibatch = spoilt  # type: ignore[method-assign]
    assert trainer.update == 2
    assert len(seen) == 3
    assert trainer.watch.stopped is not None
    assert trainer.watch.stopped.startswith("update 3: policy_loss is ")
    assert all(torch.isfinite(weight).all() for weight in trained_weights(trainer))
    if not eval_every:
        assert all(map(torch.equal, trained_weights(trainer), before))
        assert trainer.kept_update == 2


def test_entropy_collapse_stops(folders: Folders) -> None:
    trainer = make_trainer(folders, updates=3, entropy_floor=100.0)
    assert len(list(trainer)) == 1
    assert "below entropy_floor 100" in str(trainer.watch.stopped)


def test_the_moving_average_is_what_is_evaluated_and_kept(folders: Folders) -> None:
    plain = make_trainer(folders, updates=2)
    average = make_trainer(folders, updates=2, ema_decay=0.9)
    start = trained_weights(average)
    one, other = ([without_times(row) for row in trainer] for trainer in (plain, average))
    assert one == other, "training itself goes on with the weights"
    kept, last = trained_weights(average), trained_weights(plain)
    policy = len(average.policy_learner.weights)
    for begin, now, mean in zip(start[:policy], last[:policy], kept[:policy], strict=True):
        # after four steps a share of 0.9^4 = 0.66 is still the start
        assert (mean - begin).norm() < 0.5 * (now - begin).norm()
    assert all(map(torch.equal, kept[policy:], last[policy:])), "the value model has none"

    watched = make_trainer(folders, updates=1, ema_decay=1.0, eval_every=1, eval_prompts=2)
    row = next(iter(watched))
    assert watched.held_out_start is not None
    assert row["held_out_score"] == watched.held_out_start.score, "an average that does not move"
    assert not all(map(torch.equal, watched.policy_learner.weights, start[:policy])), "the weights do"


def test_the_toy_reward_is_what_it_says() -> None:
    assert liked([], [[3, 200], [4], [200, 201, 149, 2]]) == [2.0, 4.0, 1.0]
