"""The KL penalty that holds the policy near the SFT model: its estimate a token, and its coefficient."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """An estimate (B, R) of KL(policy, reference) at each sampled token, 0 on padding. Arguments (B, R).

    With r = pi_ref / pi: k1 = -log r, unbiased, negative where the reference likes the token better; k3 = r - 1 -
    log r, unbiased, never negative, of lower variance (Schulman, "Approximating KL divergence", 2020). InstructGPT,
    equation 2, has k1.
    """
    log_ratio = (ref_logprobs - logprobs) * mask
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


class KLController:
    """The penalty's coefficient: fixed without a target, else steered so that the KL of a response nears the target.

    Ziegler et al. 2019, section 2.2: error = clip(KL / target - 1, -0.2, 0.2), coefficient *= 1 + error * episodes /
    horizon. (The paper writes the gain as 0.1 an update; their code has episodes / horizon, which does not depend on
    the batch size.)
    """

    def __init__(self, coefficient: float, target: float | None, horizon: int) -> None:
        """target: nats a response, or None; horizon: episodes in which an error of 0.2 raises it e^0.2-fold."""
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """kl: the mean over the update's episodes, summed over each one's tokens."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * episodes / self.horizon
