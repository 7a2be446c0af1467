"""The draw without a sort, where it differs from the core's."""

import numpy as np
import pytest
import torch
from helpers.sampling import grid, run

from microvllm import SamplingParams
from microvllm.cpu import elementwise
from microvllm.loading import pick_backend

CPU = pick_backend("numba", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "spread, top_p", [(0.3, 0.1), (0.3, 0.999), (3.0, 0.9), (10.0, 0.1), (10.0, 0.999)]
)
def test_top_p_over_a_large_vocabulary_keeps_what_a_sort_keeps(spread, top_p):
    """16 rows that keep from one token to tens of thousands, 32 draws of each."""
    logits = torch.randn(16, 65536, generator=torch.manual_seed(3)) * spread
    weights = torch.softmax(logits.double(), -1)
    ordered = weights.sort(-1, descending=True).values
    above = ordered.cumsum(-1) - ordered
    uniform = grid(32).repeat(16)
    params = [SamplingParams(top_p=top_p)] * 512
    tokens = run(CPU, logits.repeat_interleave(32, 0), params, uniform).view(16, 32)
    # float32 knows where the border is to 1e-6 of the whole, and makes ties of near neighbours
    rounding, border = 1e-6, (above < top_p).sum(-1, keepdim=True)
    furthest = (above < top_p + rounding).sum(-1, keepdim=True) - 1
    assert (weights.gather(1, tokens) >= ordered.gather(1, furthest) * (1 - rounding)).all()
    # and the draws are those of the renormalised rest, in the order of ids, in rows where these two
    # do not matter or move the border by little
    last, first = ordered.gather(1, border - 1), ordered.gather(1, border)
    nearest = (above < top_p - rounding).sum(-1, keepdim=True) - 1
    clear = (nearest == furthest) & (first < last * (1 - rounding)) | (last < rounding)
    assert clear.sum() >= 8
    kept = weights * (weights >= last)
    after = kept.cumsum(-1).gather(1, tokens)
    before, target = after - kept.gather(1, tokens), uniform.view(16, 32) * kept.sum(-1)[:, None]
    right = (before < target + 3 * rounding) & (target < after + 3 * rounding)
    assert (right | ~clear).all()


def test_uniform_numbers_at_the_border_of_two_blocks_of_ids():
    """256 ids are one block of the search: half the numbers fall before the second, half in it."""
    for count, u, token in [(512, 0.5, 256), (1024, 0.25, 256), (1024, 0.75, 768)]:
        below = float(np.nextafter(np.float32(u), np.float32(0)))
        tokens = run(CPU, torch.zeros(2, count), [SamplingParams()] * 2, [below, u])
        assert tokens.tolist() == [token - 1, token]


def test_a_block_whose_sum_was_rounded_up_gives_no_token_without_weight():
    """1 + 3/4 of a step of float32 is summed as a step more, and the number falls between."""
    step = np.float32(2.0**-23)
    w = np.zeros(512, np.float32)
    w[0], w[1], w[300] = 1, 0.75 * step, 1
    sums = np.zeros(2, np.float32)
    u = (1 + 0.9 * float(step)) / (2 + float(step))
    assert elementwise._draw(w, sums, u) == 1
    assert sums[0] == 1 + step
