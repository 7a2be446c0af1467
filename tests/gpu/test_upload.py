"""Weights come to the card as they are, in the card's dtype."""

from types import SimpleNamespace

import pytest
import torch

from microvllm.fused.backend import Backend
from microvllm.gpu import backend, upload


class Card:
    """Its stream: copies are done when their event is waited for."""

    def __init__(self):
        self.queue = []

    def record_event(self):
        done, self.queue = self.queue, []
        return SimpleNamespace(synchronize=lambda: [copy() for copy in done])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_buffer_is_filled_again_only_when_it_was_read(dtype, monkeypatch):
    card, copy, empty = Card(), torch.Tensor.copy_, torch.empty

    def queued(target, source, non_blocking=False):
        later = card.queue.append if non_blocking else (lambda call: call())
        later(lambda: copy(target, source))
        return target

    monkeypatch.setattr(upload, "BUFFER_BYTES", 4000)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **kw: empty(*a, **kw).fill_(0))
    monkeypatch.setattr(torch.Tensor, "copy_", queued)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: card)
    uploader = upload.Uploader(torch.device("cuda", 0))
    given = [torch.randn(*shape) for shape in ((70, 90), (3, 5), (4000,), (1, 2001))]
    there = [torch.zeros(x.shape, dtype=dtype) for x in given]
    given[1].requires_grad_()  # a live module's parameter
    with torch.no_grad():
        for target, source in zip(there, given, strict=True):
            uploader.fill(target, source)
    assert not torch.equal(there[-1], given[-1].to(dtype))  # the host did not wait
    for event in uploader.events:
        event.synchronize()
    for target, source in zip(there, given, strict=True):
        assert torch.equal(target, source.to(dtype))


def test_only_what_is_large_and_on_the_cpu_takes_this_way(monkeypatch):
    seen, plain = [], []
    way = SimpleNamespace(fill=lambda *pair: seen.append(pair))
    monkeypatch.setattr(backend, "Uploader", lambda device: way)
    monkeypatch.setattr(Backend, "fill", lambda self, *pair: plain.append(pair))
    here = backend.GpuBackend(torch.device("cpu"), torch.float32)
    tensors = {
        (kind, size): SimpleNamespace(device=torch.device(kind), numel=lambda n=size: n)
        for kind in ("cpu", "cuda") for size in (9, 2**20)
    }  # fmt: skip
    for target, source, expected in (
        (("cuda", 2**20), ("cpu", 2**20), seen), (("cuda", 9), ("cpu", 9), plain),
        (("cpu", 2**20), ("cpu", 2**20), plain), (("cuda", 2**20), ("cuda", 2**20), plain),
    ):  # fmt: skip
        here.fill(tensors[target], tensors[source])
        assert expected.pop() == (tensors[target], tensors[source]) and not seen and not plain
