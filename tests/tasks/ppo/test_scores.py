"""Score shaping, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tasks.ppo.scores import RunningMoments, clip_scores, score_missing_end


def test_running_moments_by_hand() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    assert (moments.mean, moments.std) == (2.0, 1.0)
    moments.update(torch.tensor([5.0, 7.0]))
    # of 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    assert moments.mean == pytest.approx(4.0)
    assert moments.std == pytest.approx(math.sqrt(5))
    assert_close(moments.normalise(torch.tensor([4.0, 9.0])), torch.tensor([0.0, math.sqrt(5)]))


def test_running_moments_are_those_of_all_values_at_once() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 3 + 100
    moments = RunningMoments()
    for part in values.split(37):
        moments.update(part)
    assert moments.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert moments.std == pytest.approx(values.std(correction=0).item(), rel=1e-12)


def test_equal_scores_are_not_divided_by_nothing() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([2.0, 2.0]))
    assert moments.normalise(torch.tensor([2.0, 3.0])).tolist() == [0.0, 1.0]


def test_clip_scores() -> None:
    scores = torch.tensor([-7.0, -1.0, 2.5])
    assert clip_scores(scores, 2.0).tolist() == [-2.0, -1.0, 2.0]
    assert clip_scores(scores, None).tolist() == scores.tolist()


def test_a_missing_end_is_replaced_or_penalised() -> None:
    scores, ended = torch.tensor([1.5, 2.0, -3.0]), torch.tensor([True, False, False])
    assert score_missing_end(scores, ended, -1.0, 9.0).tolist() == [1.5, -1.0, -1.0]
    assert score_missing_end(scores, ended, None, 0.5).tolist() == [1.5, 1.5, -3.5]
    assert score_missing_end(scores, ended, None, 0.0).tolist() == scores.tolist()
