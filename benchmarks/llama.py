"""Make a Llama with as many weights as a nanochat, for engines that do not support nanochat.

    python benchmarks/llama.py OUT --depth 12 --vocab 32768             # a Hugging Face folder
    python benchmarks/llama.py OUT --to openvino --precision int8       # OUT/openvino-int8
    python benchmarks/llama.py OUT --to gguf --precision int4           # OUT/gguf-int4

The folder has config.json and model.safetensors, with random float32 weights. The matrices have the
sizes of nanochat's first era, except those of the feed-forward. Nanochat has two with 4 times the
width, and a Llama has three, so they have 8/3 of the width here (2,048 instead of 3,072 at a width
of 768). This is rounded down to a multiple of 32, as low-bit formats need it (672 at a width of
256). So a step reads and multiplies about the same number of weights.

--to converts the model in OUT with packages of this interpreter: `openvino`, with a graph in the
form that its GenAI pipelines expect; or `gguf` and `llama_cpp`, which has the code that rounds to 8
and 4 bits. They need only numpy, not torch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import shutil
from pathlib import Path

import numpy as np

PRECISIONS = {
    "openvino": ("float32", "bfloat16", "int8"),
    "gguf": ("float32", "bfloat16", "int8", "int4"),
}
ROPE_BASE, EPS = 10000.0, 1e-6
HEAD = "lm_head.weight"


# the model ----------------------------------------------------------------------------------------


def feed_forward(width: int) -> int:
    """The hidden size of a Llama's feed-forward: its three matrices have about as many weights as
    nanochat's two of 4 * width."""
    return max(32, 8 * width // 3 // 32 * 32)


def shape(depth: int, width: int, head_dim: int, kv_heads: int | None, vocab: int) -> dict:
    """A Llama's config.json. Raises ValueError if heads and width do not match."""
    heads = width // head_dim
    if heads * head_dim != width or heads % (kv_heads or heads):
        raise ValueError(
            f"--width {width} must be whole heads of --head-dim {head_dim}, and their number a "
            f"multiple of --kv-heads {kv_heads}"
        )
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "num_hidden_layers": depth, "hidden_size": width, "head_dim": head_dim,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads or heads,
        "intermediate_size": feed_forward(width), "vocab_size": vocab,
        "max_position_embeddings": 2048, "rms_norm_eps": EPS, "rope_theta": ROPE_BASE,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32",
    }  # fmt: skip


def llama_for(nanochat: dict) -> dict:
    """The Llama that corresponds to a nanochat, both as Hugging Face's config.json."""
    return shape(
        nanochat["num_hidden_layers"], nanochat["hidden_size"],
        nanochat["hidden_size"] // nanochat["num_attention_heads"],
        nanochat["num_key_value_heads"], nanochat["vocab_size"],
    )  # fmt: skip


def tensors(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in Hugging Face's format."""
    c, d = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    wide, vocab = config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, c)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (q, c), "self_attn.k_proj": (kv, c), "self_attn.v_proj": (kv, c),
            "self_attn.o_proj": (c, q), "mlp.gate_proj": (wide, c), "mlp.up_proj": (wide, c),
            "mlp.down_proj": (c, wide), "input_layernorm": (c,), "post_attention_layernorm": (c,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": size for name, size in layer.items()}
    return shapes | {"model.norm.weight": (c,), HEAD: (vocab, c)}


def count_weights(config: dict) -> int:
    """The number of weights that a step multiplies by: all matrices except the embedding."""
    sizes = tensors(config)
    del sizes["model.embed_tokens.weight"]
    return sum(math.prod(size) for size in sizes.values() if len(size) == 2)


def make_folder(out: Path, config: dict, seed: int = 0) -> Path:
    """Write config.json and model.safetensors, random float32 weights, into `out`; returns it."""
    out.mkdir(parents=True, exist_ok=True)
    header, at = {}, 0
    for name, size in tensors(config).items():
        end = at + 4 * math.prod(size)
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(seed)
    with open(out / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in tensors(config).values():
            if len(size) == 1:
                weight = np.ones(size, np.float32)
            else:  # a product keeps the scale of its input
                weight = draw.standard_normal(size, np.float32) * np.float32(size[-1] ** -0.5)
            weight.tofile(file)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def read_folder(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(config, tensors mapped from the file) of a folder from `make_folder`."""
    config, path = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    weights = {}
    for name, entry in header.items():
        at = 8 + size + entry["data_offsets"][0]
        weights[name] = np.memmap(path, np.float32, "r", at, tuple(entry["shape"]))
    return config, weights


# OpenVINO -----------------------------------------------------------------------------------------


class Graph:
    """A Llama as nodes of OpenVINO, in forms that its plugins recognise: they fuse norms, rotary
    embeddings and the decompression of weights, and turn attention over a state into paged
    attention."""

    def __init__(self, config: dict, weights: dict, precision: str):
        import openvino
        from openvino import opset13

        self.config, self.weights, self.precision = config, weights, precision
        self.ov, self.op = openvino, opset13

    def numbers(self, values, kind=np.int64):
        return self.op.constant(np.array(values, kind))

    def weight(self, name: str):
        """A matrix in the precision of the file, and its conversion to float32."""
        matrix, op = np.asarray(self.weights[name]), self.op
        if self.precision == "float32":
            return op.constant(matrix)
        if self.precision == "bfloat16":
            return op.convert(op.constant(matrix, dtype=self.ov.Type.bf16), "f32")
        # unsigned bytes, with a scale and a zero point for each row, as in OpenVINO's own tools
        low, high = np.minimum(matrix.min(1), 0), np.maximum(matrix.max(1), 0)
        scale = np.maximum(high - low, 1e-30)[:, None] / 255
        zero = np.round(-low[:, None] / scale).astype(np.uint8)
        levels = np.clip(np.round(matrix / scale) + zero, 0, 255).astype(np.uint8)
        levels, zero = (op.convert(op.constant(each), "f32") for each in (levels, zero))
        scale = op.constant(scale.astype(np.float32))
        return op.multiply(op.subtract(levels, zero), scale)

    def linear(self, x, name: str):
        return self.op.matmul(x, self.weight(name), False, True)

    def norm(self, x, name: str):
        op = self.op
        square = op.reduce_mean(
            op.power(x, self.numbers([2], np.float32)), self.numbers([-1]), True
        )
        root = op.sqrt(op.add(square, self.numbers([self.config["rms_norm_eps"]], np.float32)))
        x = op.multiply(x, op.divide(self.numbers([1], np.float32), root))
        return op.multiply(op.constant(np.asarray(self.weights[name])), x)

    def heads(self, x, count: int):
        """(B, T, heads * D) -> (B, heads, T, D)."""
        size = self.numbers([0, 0, count, self.config["head_dim"]])
        return self.op.transpose(
            self.op.reshape(x, size, special_zero=True), self.numbers([0, 2, 1, 3])
        )

    def rotated(self, x, cos, sin):
        op, d = self.op, self.config["head_dim"]

        def half(start: int, stop: int):
            ends = (self.numbers([n]) for n in (start, stop, 1, -1))
            return op.slice(x, *ends)

        other = op.multiply(half(d // 2, d), self.numbers([-1], np.float32))
        turned = op.concat([other, half(0, d // 2)], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def append(self, x, name: str, rows, beams, sinks: list):
        """Append x (B, heads, T, D) to the state `name`. Returns the new state."""
        op, heads, d = self.op, self.config["num_key_value_heads"], self.config["head_dim"]
        size = op.concat([rows, *(self.numbers([n]) for n in (heads, 0, d))], 0)
        empty = op.broadcast(self.numbers(0, np.float32), size)
        past = op.read_value(
            empty, name, self.ov.Type.f32, self.ov.PartialShape([-1, heads, -1, d])
        )
        state = op.concat([op.gather(past, beams, self.numbers(0)), x], 2)
        sinks.append(op.assign(state, name))
        return state

    def repeated(self, x):
        """Repeat each key or value head for the query heads that share it."""
        op, heads, d = self.op, self.config["num_key_value_heads"], self.config["head_dim"]
        times = self.config["num_attention_heads"] // heads
        if times == 1:
            return x
        size = self.numbers([1, 1, times, 1, 1])
        x = op.broadcast(op.unsqueeze(x, self.numbers(2)), size, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(x, self.numbers([0, heads * times, -1, d]), special_zero=True)

    def mask(self, mask, ids):
        """(B, 1, T, past + T): 0 where a token attends to another, else the smallest number."""
        op, one = self.op, self.numbers(1)
        end, new = (op.gather(op.shape_of(each), one, self.numbers(0)) for each in (mask, ids))
        keys = op.range(self.numbers(0), end, one, "i64")
        queries = op.unsqueeze(op.range(op.subtract(end, new), end, one, "i64"), one)
        is_token = op.unsqueeze(op.greater(mask, self.numbers(0)), self.numbers([1, 2]))
        visible = op.logical_and(op.less_equal(keys, queries), is_token)
        nothing = self.numbers(np.finfo(np.float32).min, np.float32)
        return op.select(visible, self.numbers(0, np.float32), nothing)

    def model(self):
        """input_ids and position_ids (B, T), attention_mask (B, past + T), beam_idx (B,) -> logits
        (B, T, V)."""
        op, config, sinks = self.op, self.config, []
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = [op.parameter([-1, -1], self.ov.Type.i64) for _ in names]
        inputs.append(op.parameter([-1], self.ov.Type.i32))
        for node, name in zip(inputs, (*names, "beam_idx"), strict=True):
            node.set_friendly_name(name)
            node.output(0).get_tensor().set_names({name})
        ids, mask, positions, beams = inputs
        d, heads = config["head_dim"], config["num_attention_heads"]
        kv_heads = config["num_key_value_heads"]
        rows = op.gather(op.shape_of(ids), self.numbers([0]), self.numbers(0))
        frequencies = config["rope_theta"] ** -(np.arange(0, d, 2) / d)
        angles = op.matmul(
            op.convert(op.unsqueeze(positions, self.numbers(2)), "f32"),
            self.numbers(frequencies[None, None], np.float32), False, False,
        )  # fmt: skip
        angles = op.unsqueeze(op.concat([angles, angles], -1), self.numbers(1))
        cos, sin = op.cos(angles), op.sin(angles)
        mask = self.mask(mask, ids)
        x = op.gather(self.weight("model.embed_tokens.weight"), ids, self.numbers(0))
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            h = self.norm(x, f"{layer}input_layernorm.weight")
            q, k, v = (
                self.heads(self.linear(h, f"{layer}self_attn.{name}_proj.weight"), count)
                for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
            k, v = (
                self.repeated(self.append(each, f"{layer}{name}", rows, beams, sinks))
                for name, each in (("key", k), ("value", v))
            )
            y = op.scaled_dot_product_attention(q, k, v, mask)
            y = op.transpose(y, self.numbers([0, 2, 1, 3]))
            y = op.reshape(y, self.numbers([0, 0, heads * d]), special_zero=True)
            x = op.add(x, self.linear(y, f"{layer}self_attn.o_proj.weight"))
            h = self.norm(x, f"{layer}post_attention_layernorm.weight")
            gate = op.swish(self.linear(h, f"{layer}mlp.gate_proj.weight"))
            h = op.multiply(gate, self.linear(h, f"{layer}mlp.up_proj.weight"))
            x = op.add(x, self.linear(h, f"{layer}mlp.down_proj.weight"))
        logits = self.linear(self.norm(x, "model.norm.weight"), HEAD)
        logits.output(0).get_tensor().set_names({"logits"})
        return self.ov.Model([op.result(logits)], sinks, inputs, "llama")


def to_openvino(folder: Path, precision: str, out: Path) -> None:
    """Convert the folder to OpenVINO's intermediate representation."""
    import openvino

    config, weights = read_folder(folder)
    model = Graph(config, weights, precision).model()
    openvino.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
    shutil.copy(folder / "config.json", out)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))


# GGUF ---------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers": "blk", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(folder: Path, out: Path) -> None:
    """Convert the folder to one GGUF file, in float32 and without the texts of tokens."""
    import gguf

    config, weights = read_folder(folder)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbours, (0, 1), (2, 3); Hugging Face rotates halves
            parts = weight.reshape(-1, 2, config["head_dim"] // 2, weight.shape[1])
            weight = np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(weight.shape)
        for hf_name, gguf_name in GGUF_NAMES.items():
            name = name.replace(hf_name, gguf_name)
        writer.add_tensor(name, np.asarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def to_gguf(folder: Path, precision: str, out: Path) -> None:
    """Convert the folder to GGUF: F32, BF16, Q8_0, or Q4_0 with a head of Q6_K. llama.cpp converts
    F32 to the other three."""
    write_gguf(folder, out / "float32.gguf")
    if precision == "float32":
        (out / "float32.gguf").rename(out / "model.gguf")
        return
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {
        "bfloat16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
        "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    }[precision]
    names = (str(out / name).encode() for name in ("float32.gguf", "model.gguf"))
    if failed := llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not make {precision} of {folder}: error {failed}")
    (out / "float32.gguf").unlink()


def convert(folder: Path, to: str, precision: str) -> Path:
    """Convert the model to another format, unless this was done before. Returns the folder of the
    result. Raises ValueError for a precision that the format does not support."""
    if precision not in PRECISIONS[to]:
        raise ValueError(f"--precision {precision}: {to} supports {', '.join(PRECISIONS[to])}")
    out = folder / f"{to}-{precision}"
    if not out.exists():  # under another name until it is complete
        unfinished = folder / f"{out.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        {"openvino": to_openvino, "gguf": to_gguf}[to](folder, precision, unfinished)
        unfinished.rename(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the model, made if it is missing")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, help="channels (default: 64 per layer)")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", choices=sorted(PRECISIONS))
    parser.add_argument("--precision", default="float32")
    args = parser.parse_args()
    try:
        if not (args.out / "config.json").exists():
            width = args.width or 64 * args.depth
            config = shape(args.depth, width, args.head_dim, args.kv_heads, args.vocab)
            make_folder(args.out, config, args.seed)
        out = convert(args.out, args.to, args.precision) if args.to else args.out
    except ValueError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"{error}: pip install gguf llama-cpp-python, or openvino-genai")
    print(out)


if __name__ == "__main__":
    main()
