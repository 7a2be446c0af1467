"""Which cards get the kernels of Triton."""

import pytest
import torch

from microvllm.gpu import has_triton
from microvllm.loading import pick_backend


def test_older_cards_go_without_triton(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("microvllm.gpu.attention.make_counts", lambda device: None)  # no such card
    for index, (capability, here) in enumerate([((7, 5), False), ((8, 0), True), ((9, 0), True)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        device = torch.device("cuda", 90 + index)  # it asks once for each card
        assert has_triton(device) == here
        name = "triton" if here else "sdpa"
        assert pick_backend("auto", device, torch.float32).name == name
    with pytest.raises(ValueError, match="Ampere"):
        pick_backend("triton", torch.device("cuda", 90), torch.float32)
    assert not has_triton(torch.device("cpu"))
