"""Counting live tensors."""

import torch

from prismatic.training.live_bytes import LiveBytes


def test_counts_what_is_alive_once() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        view = before[:10]  # was there before
        made = torch.zeros(100)  # 400 bytes
        half = made.view(2, 50)[0]
        assert live.now == 400
        gone = made + 1
        del gone, made
        assert (live.now, live.peak) == (400, 800)  # half keeps all of it
        del half
    assert live.now == 0 and view.shape == (10,)


def test_sees_what_autograd_keeps() -> None:
    x = torch.ones(256, requires_grad=True)
    with LiveBytes() as live:
        y = (x.exp() * 2).sum()  # exp keeps its result, the product nothing
        assert live.now == 256 * 4 + 4
        y.backward()
        del y
        assert live.now == 256 * 4  # the gradient
