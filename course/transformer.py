"""The bundled model as plain functions. You need not read this: see `common.py` for its use."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

if (SOURCE := Path(__file__).parents[1] / "src").is_dir():  # a clone, perhaps not installed
    sys.path.insert(0, str(SOURCE))

from microvllm.checkpoint import find_tokenizer, load_model
from microvllm.cli.commands import MODEL_DIR
from microvllm.tokenizer import load_tokenizer

torch.set_num_threads(1)  # the calls are small: a second thread would mostly wait

LAYERS, KV_HEADS, HEAD_DIM = 6, 2, 64  # the bundled model, with 8 million parameters
TOKEN_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4  # K and V of one token, in float32
CONTEXT = 256  # tokens: the window of some layers, and the limit of the course's texts


def norm(x):
    return F.rms_norm(x, (x.shape[-1],), eps=2.0**-23)


class Model:
    """nanochat's GPT as plain functions, with the weights of the bundled model and no cache."""

    def __init__(self):
        gpt = load_model(MODEL_DIR)
        self.config, self.recipe, self.cos, self.sin = gpt.config, gpt.recipe, gpt.cos, gpt.sin
        self.w = gpt.state_dict()  # name -> tensor
        self.tokenizer = load_tokenizer(find_tokenizer(MODEL_DIR))

    @torch.inference_mode()
    def __call__(self, chunks, attend, last=None):
        """Logits (B, V) of the last row of each chunk, or of the rows `last`."""
        w, n = self.w, self.config.n_layer
        places = [(text, i) for text, start, stop in chunks for i in range(start, stop)]
        ids = torch.tensor([text[i] for text, i in places])
        previous = torch.tensor([text[i - 1] if i else 0 for text, i in places])
        positions = torch.tensor([i for _, i in places])
        # the embedding of the token, plus a gated part of the embedding before it (smear)
        x = norm(w["transformer.wte.weight"][ids])
        gate = w["smear_lambda"] * torch.sigmoid(F.linear(x[:, :24], w["smear_gate.weight"]))
        before = norm(w["transformer.wte.weight"][previous])
        x = x0 = x + gate * (positions > 0)[:, None] * before
        for i in range(n):
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
            x = x + self.attention(i, norm(x), ids, positions, attend)
            hidden = F.relu(F.linear(norm(x), w[f"transformer.h.{i}.mlp.c_fc.weight"])).square()
            x = x + F.linear(hidden, w[f"transformer.h.{i}.mlp.c_proj.weight"])
            if i == n // 2:
                middle = x
        x = x - w["backout_lambda"] * middle
        if last is None:
            last = torch.tensor([stop - start for _, start, stop in chunks]).cumsum(0) - 1
        return F.linear(norm(x[last]), w["lm_head.weight"])[:, : self.config.vocab_size]

    def attention(self, i, x, ids, positions, attend):
        """Layer i: compute queries, keys and values of the rows, and call the step's attention."""
        w, name, recipe = self.w, f"transformer.h.{i}.attn.", self.recipe
        q, k, v = (F.linear(x, w[f"{name}c_{c}.weight"]).view(len(x), -1, HEAD_DIM) for c in "qkv")
        if f"value_embeds.{i}.weight" in w:  # a second embedding, added to the values
            gate = torch.sigmoid(F.linear(x[:, : recipe.gate_channels], w[f"{name}ve_gate.weight"]))
            values = w[f"value_embeds.{i}.weight"][ids].view_as(v)
            v = v + recipe.gate_scale * gate[:, :, None] * values
        q, k = (norm(self.rotate(part, positions)) * recipe.qk_scale for part in (q, k))
        return F.linear(attend(i, q, k, v).flatten(1), w[f"{name}c_proj.weight"])

    def rotate(self, x, positions):
        """Rotary embedding: rotate each pair of channels by an angle that depends on position."""
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)
