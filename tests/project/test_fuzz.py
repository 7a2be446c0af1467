"""Files, parameters and command lines that mean harm, or nothing: each is answered rightly or
refused in one clear line. No traceback, nothing of the file is run, no hang, and no crash.

FUZZ=20000 pytest tests/project/test_fuzz.py tries more of each. By default there are few, since
test_fuzz_many.py tries the readers alone, a hundred times as fast. Here a case that fails shrinks.
"""

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers.damage import STEPS, WORDS, trace_events
from helpers.goldens import ERAS
from helpers.tokenizer_files import dumps, encoding_with, parts
from hypothesis import HealthCheck, example, given, settings

from microvllm import LLM, SamplingParams
from microvllm.cli import main
from microvllm.cli.bench import check_choices, read_prompts
from microvllm.features.calculator import calculate
from microvllm.jobs.rows import import_pyarrow, read_rows
from microvllm.loading import find_checkpoint, load_model, read_checkpoint
from microvllm.sources.strict import open_tokenizer, read_weights
from microvllm.trace import read, write_chrome, write_page

EXAMPLES = int(os.environ.get("FUZZ", 0))
CHECKPOINT = ERAS / "era1_padded" / "chatsft_checkpoints" / "d5"
WEIGHTS, META = "model_000700.pt", "meta_000700.json"
TOKENIZER = ERAS / "tokenizer" / "tokenizer.pkl"
FOLDER = ERAS / "hf_era1_padded"
pytestmark = pytest.mark.usefixtures("one_thread", "memory")
MEMORY = 256 * 2**20  # beyond three times a file's size, what a reader and the test may take


def of_status(name: str) -> int:
    """Bytes: a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s*(\d+)", status)[1]) * 1024


@pytest.fixture
def memory(request):
    """What a test takes at its worst moment, above what was taken before it."""
    fuzzed = hasattr(request.function, "hypothesis")
    if not fuzzed or not Path("/proc/self/clear_refs").exists():
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins at what is taken now
    before = of_status("VmRSS")
    yield
    peak = of_status("VmHWM") - before
    if EXAMPLES:
        print(f"\n{request.node.name}: {EXAMPLES:,} cases, {peak / 2**20:,.0f} MB at most")
    largest = max(file.stat().st_size for file in ERAS.rglob("*") if file.is_file())
    assert peak < 3 * largest + MEMORY


def fuzz(examples: int):
    """This number of examples, or the number in FUZZ."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=EXAMPLES or examples, deadline=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory, and in it a copy of a checkpoint, of its tokenizer and of a folder of Hugging
    Face's: what is changed in it is put back by the next example."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(CHECKPOINT, root / "model")
    shutil.copytree(FOLDER, root / "folder")
    shutil.copytree(TOKENIZER.parent, root / "tokenizer")
    return root


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=9,
)


@st.composite
def damaged(draw, data: bytes, ends: int = 4096) -> bytes:
    """The bytes with a few changed, cut out, doubled or put in, most of them near either end, where
    the headers of a format are."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        near = st.integers(0, min(ends, len(data)) - 1)
        at = draw(near | near.map(lambda i: len(data) - 1 - i) | st.integers(0, len(data) - 1))
        how = draw(st.sampled_from(["set", "set", "flip", "cut", "drop", "double", "put", "zero"]))
        if how == "set":
            data[at] = draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
        elif how == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[at:]
        elif how == "put":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif how == "zero":
            data[at : at + 8] = bytes(len(data[at : at + 8]))
        else:
            length = draw(st.integers(1, 64))
            data[at : at + length] = data[at : at + length] * 2 * (how == "double")
    return bytes(data)


@st.composite
def changed(draw, value):
    """A JSON value like this one, with something in it replaced, left out or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        how = draw(st.sampled_from(["in", "in", "in", "drop", "add"]))
        if how == "drop":
            return {k: v for k, v in value.items() if k != key}
        if how == "add":
            return {**value, draw(st.text(max_size=9)): draw(JSON)}
        return {**value, key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        how = draw(st.sampled_from(["in", "in", "in", "drop", "double"]))
        if how == "in":
            return [*value[:at], draw(changed(value[at])), *value[at + 1 :]]
        return value[:at] + value[at : at + 1] * 2 * (how == "double") + value[at + 1 :]
    if type(value) in (int, float) and draw(st.booleans()):
        numbers = [0, 1, -1, value + 1, -value, 2**31, 2**63, 10**30, 1e308, float("nan"), 0.5]
        return draw(st.sampled_from([*numbers, float("inf"), str(value)]))
    return draw(JSON)


# checkpoints --------------------------------------------------------------------------------------


def put(file: Path, data: bytes) -> None:
    """Write a new file of that name: the last one may still be mapped into memory."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def look(directory: Path, file: Path) -> None:
    """Read a checkpoint to its last number, or see it refused with its name."""
    try:
        _, _, weights = read_checkpoint(*find_checkpoint(directory))
    except (ValueError, FileNotFoundError) as error:
        assert str(directory) in str(error) and len(str(error)) < 1000, error
        return
    # a tensor that reaches beyond its file would end the process here
    assert all(weight.float().sum() is not None for weight in weights.values())


@fuzz(20)
@given(data=damaged((CHECKPOINT / WEIGHTS).read_bytes()))
def test_a_damaged_checkpoint(place, data):
    (place / "model" / META).write_bytes((CHECKPOINT / META).read_bytes())
    put(place / "model" / WEIGHTS, data)
    look(place / "model", place / "model" / WEIGHTS)


def parts_of(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


PARTS = parts_of(CHECKPOINT / WEIGHTS)
OLD = io.BytesIO()
torch.save(
    torch.load(CHECKPOINT / WEIGHTS, weights_only=True), OLD, _use_new_zipfile_serialization=False
)
OLD = OLD.getvalue()
PROGRAM = next(name for name in PARTS if name.endswith("data.pkl"))


@fuzz(20)
@given(
    program=damaged(PARTS[PROGRAM], 512), parts=st.sets(st.sampled_from(sorted(PARTS)), max_size=1)
)
def test_a_checkpoint_whose_pickle_is_damaged_in_a_sound_archive(place, program, parts):
    file = place / "model" / WEIGHTS
    file.unlink(missing_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in PARTS.items():
            short = data[: len(data) // 2] if name in parts else data
            archive.writestr(name, program if name == PROGRAM else short)
    (place / "model" / META).write_bytes((CHECKPOINT / META).read_bytes())
    look(place / "model", file)


@fuzz(50)
@given(st.lists(st.sampled_from(STEPS), max_size=40).map(b"".join), st.booleans())
def test_any_program_in_a_checkpoint(place, program, zipped):
    """It is refused, or holds what the file does."""
    program, file = b"\x80\2" + program + b".", place / "model" / "any.pt"
    if zipped:
        file.unlink(missing_ok=True)
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in PARTS.items():
                archive.writestr(name, program if name == PROGRAM else data)
    else:
        torch.save({}, file, _use_new_zipfile_serialization=False)
        put(file, file.read_bytes().replace(pickle.dumps({}, 2), program, 1))
    try:
        weights = read_weights(file)
    except ValueError as error:
        assert str(file) in str(error) and len(str(error)) < 1000
    else:
        assert sum(weight.nbytes for weight in weights.values()) < file.stat().st_size


@fuzz(20)
@given(data=st.data())
def test_a_damaged_checkpoint_of_the_old_format(place, data):
    file = place / "model" / WEIGHTS
    (place / "model" / META).write_bytes((CHECKPOINT / META).read_bytes())
    put(file, data.draw(damaged(OLD, 9000)))
    look(place / "model", file)


@fuzz(40)
@given(data=st.data())
def test_tensors_of_other_shapes_and_types(place, data):
    whole = torch.load(CHECKPOINT / WEIGHTS, weights_only=True)
    weights = dict(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(whole)))
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        dtypes = [
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bool,
            torch.int8,
            torch.complex64,
        ]
        other = torch.zeros(shape, dtype=data.draw(st.sampled_from(dtypes)))
        kind = data.draw(
            st.sampled_from(["new", "sparse", "meta", "expanded", "nan", "drop", "more"])
        )
        if kind == "sparse":
            other = whole[name].to_sparse()
        elif kind == "meta":
            other = torch.empty_like(whole[name], device="meta")
        elif kind == "expanded":  # one number that claims to be a whole matrix
            other = torch.zeros(()).expand(whole[name].shape)
        elif kind == "nan":
            other = torch.full_like(whole[name], torch.nan)
        if kind == "drop":
            weights.pop(name, None)
        else:
            weights[name if kind != "more" else "more"] = other
    (place / "model" / WEIGHTS).unlink(missing_ok=True)
    torch.save(weights, place / "model" / WEIGHTS)
    (place / "model" / META).write_bytes((CHECKPOINT / META).read_bytes())
    try:
        model = load_model(place / "model")
    except ValueError as error:
        assert str(place / "model") in str(error)
    else:
        assert model.config.n_layer == 5


@fuzz(30)
@given(meta=changed(json.loads((CHECKPOINT / META).read_text())) | JSON)
def test_a_meta_file_of_any_content(place, meta):
    put(place / "model" / WEIGHTS, (CHECKPOINT / WEIGHTS).read_bytes())
    (place / "model" / META).write_text(json.dumps(meta))
    try:
        load_model(place / "model")
    except ValueError as error:
        assert str(place / "model") in str(error)


@fuzz(15)
@given(data=damaged((CHECKPOINT / META).read_bytes()))
def test_a_damaged_meta_file(place, data):
    put(place / "model" / WEIGHTS, (CHECKPOINT / WEIGHTS).read_bytes())
    (place / "model" / META).write_bytes(data)
    try:
        load_model(place / "model")
    except ValueError as error:
        assert str(place / "model") in str(error)


# Hugging Face -------------------------------------------------------------------------------------


@fuzz(20)
@given(data=damaged((FOLDER / "model.safetensors").read_bytes(), 3000))
def test_damaged_safetensors(place, data):
    shutil.copy(FOLDER / "config.json", place / "folder")
    put(place / "folder" / "model.safetensors", data)
    look(place / "folder", place / "folder" / "model.safetensors")


OWN = {"architectures": ["NanochatForCausalLM"], "rope_parameters": {"rope_theta": 1e5}}
OWN |= {"window_pattern": "SSSL", **json.loads((CHECKPOINT / META).read_text())["model_config"]}


@fuzz(30)
@given(config=changed(json.loads((FOLDER / "config.json").read_text())) | changed(OWN) | JSON)
def test_a_config_of_any_content(place, config):
    put(place / "folder" / "model.safetensors", (FOLDER / "model.safetensors").read_bytes())
    (place / "folder" / "config.json").write_text(json.dumps(config))
    look(place / "folder", place / "folder" / "config.json")


@fuzz(20)
@given(index=changed({"weight_map": {"a": "model-1-of-2.safetensors", "b": "x"}}) | JSON)
def test_an_index_of_any_content(place, index):
    shutil.copy(FOLDER / "config.json", place / "folder")
    (place / "folder" / "model.safetensors").unlink(missing_ok=True)
    (place / "folder" / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        look(place / "folder", place / "folder")
    finally:
        (place / "folder" / "model.safetensors.index.json").unlink()


# tokenizers ---------------------------------------------------------------------------------------


def use(tokenizer) -> None:
    text = "Every 1 of <|bos|> these, isn't it?\n\n\té\U0001f600\u3000 "
    ids = tokenizer.encode(text, bos=True)
    assert tokenizer.decode(ids[1:]) == text or "�" in tokenizer.decode(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@fuzz(50)
@given(data=damaged(TOKENIZER.read_bytes(), 2400) | st.binary(max_size=200))
def test_a_damaged_tokenizer(place, data):
    file = place / "tokenizer" / "tokenizer.pkl"
    file.write_bytes(data)
    try:
        tokenizer = open_tokenizer(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        try:
            use(tokenizer)
        except ValueError as error:
            assert "cannot be split" in str(error)


@fuzz(50)
@given(st.lists(st.sampled_from(WORDS) | st.binary(max_size=6), max_size=40).map(b"".join))
def test_any_program_for_the_stack_machine_of_pickle(place, program):
    file = place / "tokenizer" / "tokenizer.pkl"
    file.write_bytes(b"\x80\x04" + program + b".")
    with pytest.raises(ValueError, match="is not a nanochat tokenizer"):
        open_tokenizer(file)


@fuzz(30)
@given(pattern=st.text(max_size=30) | st.text("()[]{}*+?|.\\^$aps=!<>:0129,PL", max_size=30))
def test_a_tokenizer_with_any_pattern(place, pattern):
    file = place / "tokenizer" / "tokenizer.pkl"
    file.write_bytes(dumps(encoding_with(parts(pat_str=pattern))))
    with pytest.raises(ValueError, match="trust_tokenizer=True") as error:
        open_tokenizer(file)
    assert str(file) in str(error.value)


# files of prompts ---------------------------------------------------------------------------------

ROWS = [{"instruction": "Say it", "input": "twice"}, {"prompt": "a", "continuations": ["b", "c"]}]


@fuzz(50)
@given(
    rows=changed(ROWS) | JSON,
    suffix=st.sampled_from([".json", ".jsonl", ".parquet"]),
    noise=st.none() | st.binary(max_size=30),
)
def test_a_file_of_prompts_of_any_content(place, rows, suffix, noise):
    file = place / f"rows{suffix}"
    lines = rows if suffix == ".jsonl" and isinstance(rows, list) else [rows]
    text = "\n".join(map(json.dumps, lines)).encode() if noise is None else noise
    file.write_bytes(text)
    for reader in (read_prompts, lambda f: check_choices(read_rows(f), str(f))):
        try:
            reader(file)
        except ValueError as error:
            assert str(file) in str(error)


@pytest.fixture(scope="module")
def parquet() -> bytes:
    """A small file of every kind of column that a job may read."""
    pyarrow, data = import_pyarrow(), io.BytesIO()
    rows = [{**ROWS[i % 2], "id": i, "score": i / 7, "params": {"seed": i}} for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data, row_group_size=16)
    return data.getvalue()


@fuzz(20)
@given(data=st.data())
def test_a_damaged_parquet_file(place, parquet, data):
    file = place / "rows.parquet"
    file.write_bytes(data.draw(damaged(parquet, 1500)))
    try:
        read_rows(file)
    except ValueError as error:
        assert str(file) in str(error)


# bulk jobs ----------------------------------------------------------------------------------------

ROW = {
    "id": "a",
    "prompt": "Say it",
    "params": {"max_tokens": 2, "temperature": 0.5, "top_k": 3, "stop": ["e"], "seed": 3},
    "messages": [{"role": "user", "content": "Say it"}],
    "continuation": "twice",
}


@fuzz(12)
@given(
    lines=st.lists(
        changed(ROW).map(json.dumps).map(str.encode)
        | JSON.map(json.dumps).map(str.encode)
        | damaged(json.dumps(ROW).encode())
        | st.binary(max_size=30),
        max_size=5,
    ),
    task=st.sampled_from(["chat", "completion", "score"]),
)
@example(lines=[b"\xef\xbb\xbf", json.dumps(ROW).encode()], task="completion")
def test_a_bulk_job_over_rows_of_any_content(place, lines, task):
    """Every line is answered or reported, once, and a second run finds nothing to do."""
    source, target = place / "rows.jsonl", place / "answers.jsonl"
    for file in place.glob("answers.jsonl*"):
        file.unlink()
    source.write_bytes(b"\n".join(lines) + b"\n")
    words = ["-m", str(CHECKPOINT), "--tokenizer-dir", str(TOKENIZER), "--max-tokens", "2"]
    found = []
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main(["batch", str(source), "-o", str(target), "--task", task, *words])
        found.append((end.value.code, target.read_bytes() if target.exists() else b""))
    assert found[0][0] in (0, 1, 2) and found[1] == found[0]
    if found[0][0] < 2:
        rows = found[0][1].splitlines()
        if (errors := place / "answers.jsonl.errors").exists():
            rows += errors.read_bytes().splitlines()
        numbers = sorted(json.loads(row)["line"] for row in rows)
        kept = [i for i, line in enumerate(source.read_bytes().split(b"\n"), 1) if line.strip()]
        assert numbers == kept


# traces -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """A short trace with every kind of event in it."""
    return trace_events(tmp_path_factory.mktemp("trace"))


@fuzz(40)
@given(data=st.data())
def test_a_trace_of_any_content(place, events, data):
    lines = list(events)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 9) | st.integers(0, len(lines) - 1))
        lines[at : at + data.draw(st.integers(0, 2))] = [
            data.draw(changed(lines[at]) | st.sampled_from(events))
        ]
    file = place / "run.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        main(["trace", str(file), "-o", str(place / "run.html"), "--chrome", str(place / "c.json")])
    except SystemExit as end:
        assert end.code == 2
    else:
        page = (place / "run.html").read_text()
        assert page.lower().count("</script") == 2


@fuzz(20)
@given(
    data=damaged(
        "".join(
            json.dumps(
                {
                    "e": "pool",
                    "version": 2,
                    "blocks": 4,
                    "block_size": 2,
                    "hashes": {},
                    "cached": [],
                }
            )
            + "\n"
        ).encode()
    )
    | st.binary(max_size=200)
)
def test_a_damaged_trace(place, data):
    file = place / "run.jsonl"
    file.write_bytes(data)
    try:
        found = read(file)
        write_page(found, place / "run.html")
        write_chrome(found, place / "c.json")
    except ValueError as error:
        assert str(file) in str(error)


# sampling parameters ------------------------------------------------------------------------------

ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 7, 310, 2**31, 2**64, 10**400, 0.0, -0.0, 0.5, 1.0, 1e-45]
    + [1e38, 1e39, float("nan"), float("inf"), "a", b"a", "", (), ("a",), [], [1], [[1]], [""], {}]
    + [{1: 2.0}, {"a": 1}, [310], [311], {310: 1e6}, {311: 0}, ["\ud800"], [5, 6, 7]]
    + [np.float32(0.5), np.int8(3), [np.int64(5)], lambda tokens, logits: logits, lambda: 0, int]
)
WORKED_OUT = ("_", "plain", "edited", "truncated", "needs_history", "grammar")
NAMES = [name for name in SamplingParams.__dataclass_fields__ if name not in WORKED_OUT]


@pytest.fixture(scope="module")
def llm():
    with LLM(CHECKPOINT, tokenizer_path=TOKENIZER, num_blocks=40, block_size=4) as llm:
        yield llm


@fuzz(250)
@given(
    given=st.dictionaries(st.sampled_from(NAMES), ODD, max_size=5),
    prompt=st.sampled_from(["a", [5] * 9, []]) | ODD,
)
def test_parameters_of_any_kind(llm, given, prompt):
    free = llm.stats()["free_blocks"]
    try:
        params = SamplingParams(**{"max_tokens": 3, **given})
        outputs = llm.generate([prompt, "b"], [params, SamplingParams(0.0, 3)], use_tqdm=False)
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        odd, plain = outputs
        assert len(odd["samples"]) == params.n and odd["finish_reason"] in (
            "stop",
            "length",
            "error",
        )
        assert plain["finish_reason"] in ("stop", "length")
    assert llm.is_finished() and llm.stats()["free_blocks"] == free
    llm.scheduler.blocks.check([])


# the calculator -----------------------------------------------------------------------------------

SPELLINGS = (
    "1 9 0 . .. * ** / // + - ( ) , ' \" ' .count( .lower() __class__ open eval _ a \\ \n 0x 1e9 e "
    "j if for lambda x x: [ ] { } @ := \x00 \ud800 é ٣ \u2028"
).split(" ")


@fuzz(150)
@given(st.lists(st.sampled_from(SPELLINGS), max_size=12).map("".join) | st.text(max_size=40))
def test_an_expression_of_any_kind(expression):
    found = calculate(expression)
    assert found is None or (isinstance(found, str) and len(found) < 10_000)


# command lines ------------------------------------------------------------------------------------

FLAGS = (
    "run chat batch bench score info trace lab --json --raw --help --version -m --model --step "
    "--device --dtype --quantization --recipe --tokenizer-dir --num-blocks --max-batch-size "
    "--seed -n --max-model-len --trace --watch --max-tokens --temperature --top-k --top-p --min-p "
    "--stop --guide --repetition-penalty --ignore-eos --prompt --num-prompts --prompts-file "
    "--random-input-len --random-output-len --shared-prefix --file -o --output --chrome -- - -1 0 "
    "1 2 3.5 nan inf --task --ordered --id-column --params-column --replicas score completion "
    "instruction 1e400 99999999999999999999 cpu cuda mps float16 bfloat16 int8 softcap=20 "
    "softcap= era=1 =1 softcap=nan sft base:d20 rl:x:1 a/b ../x / . NUL \x00 é \ud800 hello"
).split(" ")


@fuzz(40)
@given(
    command=st.sampled_from("run batch bench score info trace".split()),
    words=st.lists(st.sampled_from(FLAGS), max_size=6),
)
def test_a_command_line_of_any_words(place, monkeypatch, command, words):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO("a line\n"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("microvllm.sources.hub.hub_answers", lambda: False)
    (place / "two.jsonl").write_text('{"instruction": "a"}\n{"instruction": "b"}\n')
    known = {"trace": [], "info": ["-m", str(CHECKPOINT)]}.get(
        command, ["-m", str(CHECKPOINT), "--tokenizer-dir", str(TOKENIZER)]
    )
    known += ["--max-tokens", "2"] if command in ("run", "batch", "bench") else []
    if command == "batch":
        known += ["two.jsonl", "--prompt-column", "instruction", "-o", "out.jsonl"]
        for old in place.glob("out.jsonl*"):
            old.unlink()
    known += ["--num-prompts", "2", "--prompts-file", "two.jsonl"] if command == "bench" else []
    try:
        main([command, *known, *words])
    except SystemExit as end:
        rows_were_bad = command == "batch" and end.code == 1
        assert end.code in (0, 2, None) or rows_were_bad, end.code


# what was found this way, one test each -----------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda w: w.to_sparse(),
        lambda w: torch.empty_like(w, device="meta"),
        lambda w: torch.zeros(()).expand(w.shape),
    ],
    ids=["sparse", "without a device", "one number as a matrix"],
)
@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.wte.weight"])
def test_a_tensor_that_is_not_stored_in_full_is_refused(place, name, make):
    # a traceback; the last may claim any size, and would have been written out in memory
    weights = torch.load(CHECKPOINT / WEIGHTS, weights_only=True)
    weights[name] = make(weights[name])
    (place / "model" / WEIGHTS).unlink(missing_ok=True)
    torch.save(weights, place / "model" / WEIGHTS)
    (place / "model" / META).write_bytes((CHECKPOINT / META).read_bytes())
    with pytest.raises(ValueError, match=rf"not stored in full \({name}\)"):
        load_model(place / "model")


def test_a_checkpoint_is_refused_in_one_line(place):
    # torch's own error went on for a page
    program = PARTS[PROGRAM].replace(b"K\x00K", b"]K", 1)
    file = place / "model" / WEIGHTS
    file.unlink(missing_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in PARTS.items():
            archive.writestr(name, program if name == PROGRAM else data)
    (place / "model" / META).write_bytes((CHECKPOINT / META).read_bytes())
    with pytest.raises(ValueError, match="not a readable checkpoint") as error:
        load_model(place / "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {"a": 1}}], ids=str)
def test_an_index_without_files_is_refused(place, index):
    shutil.copy(FOLDER / "config.json", place / "folder")
    (place / "folder" / "model.safetensors").unlink(missing_ok=True)
    file = place / "folder" / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map"):
        read_checkpoint(*find_checkpoint(place / "folder"))
    file.unlink()


POOL = {"e": "pool", "version": 2, "blocks": 4, "block_size": 2, "hashes": {}, "cached": []}
ARRIVE = {"e": "arrive", "t": 0, "seq": 0, "request": 0, "sample": 0, "tokens": [1], "prompt": 1}
END = {"e": "end", "t": 1, "step": 1}


@pytest.mark.parametrize(
    "lines",
    [
        [{**POOL, "blocks": 10**12}],  # 8 TB of counts
        [{**POOL, "blocks": 2**62}],
        [{**POOL, "block_size": "<b>"}],
        [POOL, {**ARRIVE, "t": "now"}],
        [POOL, {**ARRIVE, "t": float("inf")}],
        [POOL, {**ARRIVE, "seq": "<img src=x>"}],
        [POOL, ARRIVE, {"e": "admit", "t": 0, "seq": 0, "computed": "x"}],
        [POOL, ARRIVE, {**END, "e": "begin", "decodes": "", "prefills": [[0, 5, -3]]}],
        [POOL, {**END, "ms": {"schedule": "long"}}],
        [POOL, {**END, "ms": {"schedule": float("nan")}}],
        [POOL, {**END, "ms": [1]}],
        [POOL, END],
        [POOL, {"e": "end", "t": 1, "ms": {}}],
    ],
    ids=str,
)
def test_a_trace_with_numbers_that_are_none_is_refused_with_its_line(place, lines, capsys):
    file = place / "run.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit) as end:
        main(["trace", str(file), "-o", str(place / "p.html"), "--chrome", str(place / "c.json")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and f"line {len(lines)}" in said and said.count("\n") == 1


@pytest.mark.parametrize("ms", [{}, {"schedule": 1.0}])
def test_a_step_that_ends_without_a_beginning_is_drawn(place, ms):
    write_chrome([POOL, {**END, "ms": ms}], place / "c.json")
    assert json.loads((place / "c.json").read_text())["traceEvents"]


@pytest.mark.parametrize("text", [" " * 3_000_000, "a" + "\t " * 700_000 + "b"], ids=["a", "b"])
def test_a_million_blanks_are_refused_without_a_panic_on_stderr(text, capfd):
    tokenizer = open_tokenizer(TOKENIZER)
    with pytest.raises(ValueError, match="blanks in a row"):
        tokenizer.encode(text)
    assert capfd.readouterr().err == ""
    much = "a " * 1_000_000 + "\n" * 2_000_000  # no such row in it
    assert tokenizer.decode(tokenizer.encode(much)) == much
