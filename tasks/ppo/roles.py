"""Who is who in PPO: the models that were handed in, as branches on one frozen trunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.models import Branch, Trunk, freeze_trunk, shared_depth, split_model, trunk_depth
from tasks.ppo.params import PPOParams
from tasks.ppo.rewards import Reward, RewardFunction, RewardModel
from tasks.ppo.rollout import Rollout, final_states


class Value:
    """The value of a state: a scalar model of its own, or a head on the policy's final states."""

    def __init__(self, policy: Branch, model: Branch | None, bias: float, head: nn.Linear) -> None:
        """bias: taken off the model's output. The head starts at 0."""
        self.policy, self.model, self.bias, self.head = policy, model, bias, head

    @property
    def own_weights(self) -> list[nn.Parameter]:
        """Those that the value loss alone trains."""
        return list(self.head.parameters()) if self.model is None else self.model.trained()

    def of_states(self, rollout: Rollout, policy_states: Tensor | None = None) -> Tensor:
        """(B, R): of the states before each response token; 0 on padding.

        policy_states: the policy's final states (B, 1 + R, H), where a head needs them and they are known.
        """
        if self.model is not None:
            output = self.model.head(final_states(self.model, rollout)[:, :-1])[..., 0] - self.bias
        else:
            states = final_states(self.policy, rollout) if policy_states is None else policy_states
            output = self.head(states[:, :-1])[..., 0]
        return output.float() * rollout.response_mask  # type: ignore[no-any-return]


class Roles(NamedTuple):
    trunk: Trunk  # frozen; all of the others read its states
    policy: Branch  # trained
    reference: Branch  # frozen
    value: Value  # trained
    rewards: list[tuple[RewardModel | RewardFunction, float]]  # with their weights


def assign_roles(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    rewards: Sequence[tuple[Reward, float]],
    value_model: PreTrainedModel | None,
    params: PPOParams,
    device: torch.device,
) -> Roles:
    """The trunk is as deep as the trained layers leave it, and as the models have their lowest blocks in common."""
    models = [one for one in (reference, value_model, *(reward for reward, _ in rewards)) if _is_model(one)]
    depth = trunk_depth(policy, params.trainable_layers)
    for other in models:
        if other is not policy:
            depth = shared_depth(policy, other, at_most=depth)

    def trained(model: PreTrainedModel) -> Branch:
        model.to(device).eval().requires_grad_(True)
        freeze_trunk(model, trunk_depth(model, params.trainable_layers))
        return split_model(model, depth)[1]

    def frozen(model: PreTrainedModel) -> Branch:
        return split_model(model.to(device).eval().requires_grad_(False), depth)[1]

    policy_branch = trained(policy)
    value_branch = None if value_model is None else trained(value_model)
    head = nn.Linear(policy.config.hidden_size, 1, bias=False, device=device)
    nn.init.zeros_(head.weight)

    def reward_role(reward: Reward) -> RewardModel | RewardFunction:
        if not isinstance(reward, PreTrainedModel):
            return reward
        branch = value_branch.frozen_copy() if value_branch and reward is value_model else frozen(reward)
        return RewardModel(branch, _bias(reward))

    return Roles(
        Trunk(policy, depth),
        policy_branch,
        policy_branch.frozen_copy() if reference is None or reference is policy else frozen(reference),
        Value(policy_branch, value_branch, 0.0 if value_model is None else _bias(value_model), head),
        [(reward_role(reward), weight) for reward, weight in rewards],
    )


def _is_model(one: object) -> bool:
    return isinstance(one, PreTrainedModel)


def _bias(model: PreTrainedModel) -> float:
    """What our reward models carry: the mean score of the demonstrations, which counts as 0."""
    return float(getattr(model.config, "score_bias", 0.0))
