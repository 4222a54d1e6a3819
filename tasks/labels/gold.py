"""The gold score: how good a reply to an embedded ticket really is, in [0, 1]. `evaluate` alone may import this.

    gold = 0.1 * (name + order + item + apology + remedy + deadline + signature + length + invention) + 0.1 * fluency

The nine checks are those of tasks/labels/checks.py, each a mark in [0, 1]. Fluency is the one thing that no labeler
looks at: a policy that games the labelers' checks with broken language loses it, and the report shows that.
"""

from __future__ import annotations

from tasks.datasets import Ticket
from tasks.labels.checks import CHECKS, run_checks

WEIGHTS = {**dict.fromkeys(CHECKS, 0.1), "fluency": 0.1}

# Mean log-probability per token under the frozen base model, in nats, that counts as 0 and as 1. Measured with
# SmolLM2-135M-Instruct: flawless demonstrations -2.7 (-3.7 to -2.2), the same facts as mere keywords -4.5, a flawless
# reply with its words shuffled -6.5. Endless repetition has -0.6: it gains nothing above LOGPROB_AT_ONE and fails the
# checks.
LOGPROB_AT_ZERO = -5.0
LOGPROB_AT_ONE = -2.0


def fluency(mean_logprob: float) -> float:
    """A straight line from 0 at LOGPROB_AT_ZERO to 1 at LOGPROB_AT_ONE, clipped to [0, 1].

    mean_logprob: of the reply's tokens under the frozen base model, given the prompt.
    """
    return max(0.0, min(1.0, (mean_logprob - LOGPROB_AT_ZERO) / (LOGPROB_AT_ONE - LOGPROB_AT_ZERO)))


def gold_parts(reply: str, ticket: Ticket, mean_logprob: float) -> dict[str, float]:
    """{part: mark in [0, 1]}: the nine checks and fluency."""
    return {**run_checks(reply, ticket), "fluency": fluency(mean_logprob)}


def gold_score(reply: str, ticket: Ticket, mean_logprob: float) -> float:
    """The weighted sum of the parts, in [0, 1]."""
    return sum(WEIGHTS[part] * mark for part, mark in gold_parts(reply, ticket, mean_logprob).items())
