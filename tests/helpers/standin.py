"""How a test trains a module beside an engine that serves it: nanochat's two kinds of optimizers,
and a step on random tokens. The module itself is that of the examples."""

import torch

from examples.gpt import GPT as GPT
from examples.gpt import Config as Config


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal factor of each matrix's gradient. write: how the parameters are
    changed, "foreach" as nanochat does today, or "data", which autograd does not see."""

    def __init__(self, params, lr: float, write: str):
        super().__init__(params, {"lr": lr, "write": write})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            factors = [torch.linalg.svd(p.grad, full_matrices=False) for p in params]
            news = [p - group["lr"] * u @ v for p, (u, _, v) in zip(params, factors, strict=True)]
            if group["write"] == "foreach":
                torch._foreach_copy_(params, news)
            else:
                for p, new in zip(params, news, strict=True):
                    p.data.copy_(new)


def optimizers(gpt: GPT, lr: float = 0.02, write: str = "foreach") -> list[torch.optim.Optimizer]:
    """As in nanochat, Muon for the matrices of the layers and AdamW for all else."""
    matrices = list(gpt.transformer.h.parameters())
    others = [p for p in gpt.parameters() if all(p is not m for m in matrices)]
    return [Muon(matrices, lr, write), torch.optim.AdamW(others, lr)]


def train(gpt: GPT, optimizers: list[torch.optim.Optimizer], seed: int = 0) -> float:
    """One step on random tokens; returns its loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(gpt.config.vocab_size, (2, 33), generator=generator).to(gpt.get_device())
    loss = gpt(ids[:, :-1], ids[:, 1:])
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()
