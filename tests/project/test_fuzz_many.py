"""The readers of what others made, in this process, on small files: a hundred thousand cases each.

FUZZ=100000 pytest -s tests/project/test_fuzz_many.py tries this number of each kind, and prints how
many were refused and what the worst took; by default there are few. A case follows from its number.
No case may raise what is no refusal, run code, or take more than its files explain.
"""

import codecs
import ctypes
import io
import json
import os
import sys
import time
import zipfile
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers import invented
from helpers.damage import STEPS, WORDS, trace_events
from helpers.tokenizer_files import dumps, encoding_with, parts

from microvllm import SamplingParams
from microvllm.checkpoint import empty_model
from microvllm.cli import learn, policies
from microvllm.cli.bench import alpaca_prompts, check_choices
from microvllm.features.calculator import calculate
from microvllm.jobs import job, rows
from microvllm.loading import build_model
from microvllm.lowbit import folder as lowbit_folder
from microvllm.model import RECIPES, GPTConfig
from microvllm.sources import exports, huggingface, strict
from microvllm.trace import read, write_chrome, write_page

codecs.lookup("raw_unicode_escape")  # in which a pickle may be written: imported here
CASES = int(os.environ.get("FUZZ", 0))
# beyond three times its files' size, what a case may take; a process in which other tests ran takes
# and returns tens of MB of its own
MEMORY = (32 if CASES else 256) * 2**20
REFUSALS = ValueError, TypeError, OSError  # which commands tell in one line
CODE = {"exec", "import", "pickle.find_class", "marshal.loads", "code.__new__", "function.__new__",
        "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen",
        "socket.connect", "socket.getaddrinfo", "os.rename", "os.symlink"}  # fmt: skip
# what a pickle would run, did anyone import and call
EVIL = [b"cposix\nsystem\n", b"cbuiltins\nexec\n", b"(Vopen('ran','w')\ntR", b"\x8c\2os", b"\x93"]
EVIL += [
    b"\x8c\5posix\x8c\6system\x93",
    b"\x8c\11touch ran\x85R",
    b"(S'touch ran'\niposix\nsystem\n",
]


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """A short trace with every kind of event in it."""
    return trace_events(tmp_path_factory.mktemp("trace"))


class Guard:
    """What the process does during a case: code that runs, files that are written elsewhere, and
    the memory that it takes at its worst moment, above what it had before the first case."""

    def __init__(self):
        self.place, self.on, self.ran, self.begin, self.peak = "", False, [], 0, 0
        self.reset = self.status = None
        if Path("/proc/self/clear_refs").exists():
            self.reset = os.open("/proc/self/clear_refs", os.O_WRONLY)
            self.status = os.open("/proc/self/status", os.O_RDONLY)
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str) and arguments[2] is not None:
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not arguments[0].startswith(self.place):
                self.ran.append((event, *arguments))
        elif event in CODE and not self.is_policy(*arguments[:1]):
            self.ran.append((event, *map(repr, arguments)))

    def is_policy(self, code: object = None) -> bool:
        """A file that `--eviction` names is run."""
        file = getattr(code, "co_filename", "")  # which may begin with //
        return file.lstrip("/") == f"{self.place}/policy.py".lstrip("/")

    def __enter__(self):
        if self.reset is not None:
            if not self.begin:
                ctypes.CDLL(None).malloc_trim(0)  # what lies free would hide what a case takes
                self.begin = self.of_status(b"VmRSS")
            os.pwrite(self.reset, b"5", 0)  # VmHWM begins at what is taken now
        self.on = True

    def __exit__(self, *_):
        self.on = False
        if self.reset is not None:
            self.peak = self.of_status(b"VmHWM") - self.begin

    def of_status(self, name: bytes) -> int:
        found = os.pread(self.status, 4096, 0)
        return int(found[found.index(name) + 6 :].split(None, 1)[0]) * 1024


@pytest.fixture(scope="module")
def guard():
    return Guard()


@pytest.fixture
def place(monkeypatch):
    """A directory in memory, where there is one: a disk takes 3 ms a file."""
    shared = "/dev/shm"
    with TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_STATE_HOME", folder)
        monkeypatch.setenv("RUST_BACKTRACE", "0")  # which takes 48 MB once
        yield Path(folder)


def state(config: GPTConfig, recipe) -> dict[str, torch.Tensor]:
    """Weights for a config."""
    torch.manual_seed(0)
    shapes = empty_model(config, recipe, config.vocab_size).state_dict()
    return {name: torch.randn(like.shape) for name, like in shapes.items()}


def see(*tensors: torch.Tensor) -> None:
    """One that reaches beyond its file would end the process here."""
    for tensor in tensors:
        tensor.float().sum()


def test_the_guard_sees_code_files_and_memory(guard, place):
    guard.place, guard.begin = str(place), 0
    with guard:
        exec("1")
        open("/dev/null", "w").close()
        open(place / "own", "w").close()
        os.system("true")
        bytearray(50 << 20)
    assert [what for what, *_ in guard.ran] == ["exec", "open", "os.system"]
    assert guard.reset is None or 49 << 20 < guard.peak < MEMORY + (20 << 20)
    guard.ran.clear()


# the kinds: each makes files of a seed, and reads them --------------------------------------------


class Checkpoints:
    """nanochat's, in three ways: as they are, a pickle in a sound archive, the old format. Of ten
    nine are three tensors that make no model, since a long pickle takes a millisecond."""

    def __init__(self, place: Path):
        self.folder, config = place, GPTConfig(8, 16, 1, 2, 1, 8, "L")
        weights = state(config, RECIPES["1"])
        self.file, self.meta = place / "model_000001.pt", place / "meta_000001.json"
        self.meta.write_text(json.dumps({"model_config": vars(config)}))
        self.whole = self.forms(weights)
        self.part = self.forms(dict([*weights.items()][:3]))

    def forms(self, weights: dict) -> tuple:
        """An archive, the old format, a pickle, and what comes before and behind it in an archive
        that has room for a longer one."""
        new, old, made = io.BytesIO(), io.BytesIO(), io.BytesIO()
        torch.save(weights, new)
        torch.save(weights, old, _use_new_zipfile_serialization=False)
        with zipfile.ZipFile(new) as archive:
            found = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in found if name.endswith("data.pkl"))
        room = b"\0" * (len(found[name]) + 300)
        with zipfile.ZipFile(made, "w") as archive:
            for each, data in found.items():
                archive.writestr(each, room if each == name else data)
        return new.getvalue(), old.getvalue(), found[name], *made.getvalue().split(room)

    def __call__(self, rng: Random) -> None:
        whole = rng.random() < 0.1
        new, old, pickle, before, after = self.whole if whole else self.part
        match rng.randrange(4):
            case 0:
                data = invented.damaged(rng, new)
            case 1:
                data = invented.damaged(rng, old)
            case how:
                program = b"\x80\2" + invented.program(rng, [*STEPS, *EVIL]) + b"."
                if how == 2 or rng.random() < 0.5:
                    program = invented.damaged(rng, pickle)
                room = len(pickle) + 300
                data = before + program[:room].ljust(room, b"\0") + after
        self.file.unlink(missing_ok=True)
        self.file.write_bytes(data)
        weights = strict.read_weights(self.file)
        see(*weights.values())
        if whole:
            strict.read_checkpoint(self.folder, 1)


class Metas(Checkpoints):
    """The same, with a meta file of any content; what is accepted becomes a model."""

    def __init__(self, place: Path):
        super().__init__(place)
        self.file.write_bytes(self.whole[0])
        self.given = json.loads(self.meta.read_text())

    def __call__(self, rng: Random) -> None:
        self.meta.write_bytes(invented.text(rng, self.given))
        found = strict.read_checkpoint(self.folder, 1)
        build_model(*found, torch.device("cpu"), attention="sdpa")


class Folders:
    """Hugging Face's: tensors, a config, an index."""

    def __init__(self, place: Path):
        from safetensors.torch import save

        self.folder, config = place, GPTConfig(8, 16, 1, 2, 1, 8, "L")
        weights = state(config, RECIPES["1"])
        for theirs, ours in exports.NAMES.items():
            weights = {name.replace(ours, theirs): w for name, w in weights.items()}
        self.tensors = save(weights, {"format": "pt"})
        self.config = {"architectures": ["NanoChatForCausalLM"], "rms_norm_eps": 1e-6}
        self.config |= {theirs: getattr(config, ours) for ours, theirs in huggingface.SIZES.items()}
        self.index = {"weight_map": {"a": "model.0", "b": "model.0"}}

    def header(self, rng: Random) -> bytes:
        """The tensors behind a header that says something else of them."""
        size = int.from_bytes(self.tensors[:8], "little")
        told = json.dumps(invented.changed(rng, json.loads(self.tensors[8 : 8 + size]))).encode()
        return len(told).to_bytes(8, "little") + told + self.tensors[8 + size :]

    def __call__(self, rng: Random) -> None:
        tensors, config, index = self.tensors, json.dumps(self.config).encode(), None
        match rng.randrange(4):
            case 0:
                tensors = invented.damaged(rng, tensors)
            case 1:
                tensors = self.header(rng)
            case 2:
                config = invented.text(rng, self.config)
            case 3:
                index = invented.text(rng, self.index)
        self.write(config, tensors, index)
        see(*huggingface.read_folder(self.folder)[2].values())

    def write(self, config: bytes, tensors: bytes, index: bytes | None = None) -> None:
        name = "model.safetensors"
        (self.folder / name).unlink(missing_ok=True)  # the last one may still be mapped
        (self.folder / (name if index is None else "model.0")).write_bytes(tensors)
        (self.folder / "config.json").write_bytes(config)
        if index is not None:
            (self.folder / f"{name}.index.json").write_bytes(index)


class Quantised(Folders):
    """What `microvllm quantize` writes, in any number of bits."""

    def __init__(self, place: Path):
        from safetensors.torch import save

        self.folder, config, self.kinds = place, GPTConfig(8, 16, 1, 2, 1, 32, "L"), []
        told = {"format": 1, "seed": 0, "tokens": 1, "base": False} | dict.fromkeys(
            "version command source calibration".split(), ""
        )
        for bits in lowbit_folder.BITS:
            tensors = {}
            for name, weight in state(config, RECIPES["1"]).items():
                part = name.removesuffix(".weight")
                if not lowbit_folder.is_matrix(part):
                    tensors[name] = weight
                    continue
                own = lowbit_folder.bits_of(part, bits)
                planes = lowbit_folder.pack((7 * weight).clamp(-7, 7).to(torch.int8), own)
                planes["scale"] = torch.ones(len(weight), 1)
                if own == 4:
                    planes["factors"] = torch.ones(len(weight), weight.shape[1] // 32).to(
                        torch.int8
                    )
                tensors |= {f"{part}.{plane}": tensor for plane, tensor in planes.items()}
            constants = {
                name: getattr(RECIPES["1"], name) for name in ("era", *lowbit_folder._CONSTANTS)
            }
            given = {"architectures": ["NanochatForCausalLM"], "model_type": "nanochat"}
            given |= vars(config) | {"recipe": constants, "quantization": told | {"bits": bits}}
            self.kinds.append((save(tensors, {"format": "pt"}), given))

    def __call__(self, rng: Random) -> None:
        self.tensors, given = rng.choice(self.kinds)
        tensors, config = self.tensors, json.dumps(given).encode()
        match rng.randrange(4):
            case 0:
                tensors = invented.damaged(rng, tensors)
            case 1:
                tensors = self.header(rng)
            case 2:
                config = invented.text(rng, given)
            case 3:  # the tensors of other bits
                tensors = rng.choice(self.kinds)[0]
        self.write(config, tensors)
        if lowbit_folder.facts(self.folder) is None:
            raise ValueError("no such folder")
        for weight in lowbit_folder.read_folder(self.folder)[2].values():
            if isinstance(weight, lowbit_folder.Stored):
                see(lowbit_folder.unpack(weight.planes, weight.bits), weight.planes["scale"])
            else:
                see(weight)


class Tokenizers:
    """tokenizer.pkl and tokenizer.json."""

    def __init__(self, place: Path):
        self.file, self.json = place / "tokenizer.pkl", place / "tokenizer.json"
        self.good = dumps(encoding_with(parts()))
        self.head = self.good[: self.good.index(b"mergeable_ranks") + 60]
        letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        letters += [0x100 + i for i in range(256 - len(letters))]
        self.given = {
            "model": {"type": "BPE", "vocab": {chr(c): i for i, c in enumerate(letters)},
                      "merges": []},
            "pre_tokenizer": {"pretokenizers": [
                {"pattern": {"Regex": strict.PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]},
            "normalizer": None, "added_tokens": [{"content": "<|bos|>", "id": 256}],
        }  # fmt: skip

    def __call__(self, rng: Random) -> None:
        how = rng.random()
        if how < 0.2:
            self.json.write_bytes(invented.text(rng, self.given))
            return self.use(huggingface.read_tokenizer(self.json))
        if how < 0.3:
            pattern = "".join(rng.choices("()[]{}*+?|.\\^$aps=!<>:0129,PL é", k=rng.randrange(30)))
            data = dumps(encoding_with(parts(pat_str=pattern)))
        elif how < 0.45:
            data = invented.damaged(rng, self.good, 200)
        elif how < 0.6:
            data = self.head[: rng.randrange(len(self.head))] + invented.program(
                rng, [*WORDS, *EVIL]
            )
        else:
            data = b"\x80\4" + invented.program(rng, [*WORDS, *EVIL]) + b"."
        self.file.write_bytes(data)
        return self.use(strict.open_tokenizer(self.file))

    def use(self, tokenizer) -> None:
        said = "Every 1 of <|bos|> these, isn't it?\n\n\té\U0001f600\u3000 "
        assert "�" in (back := tokenizer.decode(tokenizer.encode(said))) or back == said


class JsonLines:
    """Files of prompts, as benchmarks, score --file and jobs read them."""

    def __init__(self, place: Path):
        self.file, self.array = place / "rows.jsonl", place / "rows.json"
        params = {"max_tokens": 2, "top_k": 3, "stop": ["e"], "logit_bias": {"3": 1.0}}
        turns = [{"role": "user", "content": "Say it"}]
        row = {"id": "a", "prompt": "Say it", "params": params, "messages": turns}
        self.given = [row, {"instruction": "Say", "input": "it"}]
        self.given += [{"prompt": "a", "continuations": ["b", "c"]}]

    def __call__(self, rng: Random) -> None:
        if rng.random() < 0.3:
            self.array.write_bytes(invented.text(rng, self.given))
            found = rows.read_rows(self.array)
        else:
            lines = [invented.text(rng, row) for row in rng.choices(self.given, k=rng.randrange(4))]
            self.file.write_bytes(b"\n".join([b"\xef\xbb\xbf"[: rng.choice((0, 0, 3))], *lines]))
            for number, raw in rows.read(self.file):
                try:
                    row = rows.parse(raw)
                    job._params(row.get("params"), job.Ask(), job.Ask().row_id(row, number))
                except REFUSALS as error:
                    json.dumps(job.failed(number, error).row).encode()
            found = rows.read_rows(self.file)
        for reader in alpaca_prompts, check_choices:
            with suppress(ValueError):
                reader(found, "")


class Parquet:
    """The same in Parquet, with every kind of column that a job may read."""

    def __init__(self, place: Path):
        pyarrow = rows.import_pyarrow()
        given, self.file, self.kinds = [], place / "rows.parquet", []
        for i in range(6):
            turns = [{"role": "user", "content": "é" * i}]
            given += [{"prompt": f"{i % 2}", "id": i, "x": i / 7, "p": {"seed": i}, "m": turns}]
        for options in {}, {"compression": "none", "row_group_size": 3}, {"use_dictionary": False}:
            data = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), data, **options)
            self.kinds.append(data.getvalue())

    def __call__(self, rng: Random) -> None:
        self.file.write_bytes(invented.damaged(rng, rng.choice(self.kinds), 1500))
        rows.read_rows(self.file)


class Traces:
    """A trace, the page and the timeline made of it."""

    def __init__(self, place: Path):
        self.place, self.file = place, place / "run.jsonl"
        self.good = [json.dumps(event) for event in self.given]

    def __call__(self, rng: Random) -> None:
        lines = self.good[: rng.randint(2, len(self.good))]
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(min(rng.choice((4, 99)), len(lines)))
            other = rng.choice(self.good)
            if rng.random() < 0.8:
                event = invented.changed(rng, self.given[min(at, len(self.given) - 1)])
                other = json.dumps(event)
            lines[at : at + rng.randrange(3)] = [other]
        data = "".join(f"{line}\n" for line in lines).encode()
        self.file.write_bytes(invented.damaged(rng, data) if rng.random() < 0.2 else data)
        found = read(self.file)
        write_chrome(found, self.place / "run.json")
        if rng.random() < 0.1:
            write_page(found, self.place / "run.html")
            page = (self.place / "run.html").read_text()
            assert page.lower().count("</script") == 2


class Expressions:
    """What a model writes for the calculator."""

    WORDS = ("1 9 0 . .. * ** / // + - ( ) , ' \" ' .count( .lower() __class__ open eval _ a \\ \n "
             "0x 1e9 e j if for lambda x x: [ ] { } @ := \x00 \ud800 é ٣ \u2028 99999999 'ab' "
             "__import__('os') exec( print( .replace( 'a'*9**9 9**9**9").split(" ")  # fmt: skip

    def __init__(self, place: Path):
        pass

    def __call__(self, rng: Random) -> None:
        words = "12+-*/(.)" if rng.random() < 0.3 else self.WORDS
        text = "".join(rng.choices(words, k=rng.randrange(12)))
        if rng.random() < 0.02:
            text = rng.choice("(-'[1") * rng.randrange(2000) + text
        found = calculate(text)
        assert found is None or isinstance(found, str) and len(found) < 10_000
        if found is None:
            raise ValueError("no result")


class States:
    """Where a reader is in the course and in the lab, and a file of ShareGPT's conversations."""

    def __init__(self, place: Path):
        from lab import progress, world

        self.progress, self.world, self.file = progress, world, place / "talks.json"
        (place / "microvllm").mkdir()
        self.learn = {"ran": [1, 2], "solved": [1], "folder": str(place)}
        self.lab = {"folder": str(place), "solved": [1], "hints": {"1": 2}}
        talk = [{"from": "human", "value": "a" * 20}, {"from": "gpt", "value": "b" * 30}]
        self.talks = [{"conversations": talk}, {"conversations": talk}]

    def __call__(self, rng: Random) -> None:
        match rng.randrange(3):
            case 0:
                learn.state_file().write_bytes(invented.text(rng, self.learn))
                learn.read_state()
                if rng.random() < 0.1:
                    for number in None, 1:
                        self.run(learn_command, number)
            case 1:
                learn.state_file("lab").write_bytes(invented.text(rng, self.lab))
                learn.mark("lab", "solved", 2)
                if rng.random() < 0.1:
                    self.run(self.progress.exercises, [])
                    self.run(self.progress.hint, ["1"])
                    self.run(learn.load_exercises, "lab")
            case 2:
                self.file.write_bytes(invented.text(rng, self.talks))
                try:
                    self.world.read_sharegpt(str(self.file))
                except self.world.argparse.ArgumentTypeError as error:
                    raise ValueError(str(error)) from None

    def run(self, command, *arguments) -> None:
        with suppress(ValueError, OSError, SystemExit):
            command(*arguments)


def learn_command(number: int | None) -> None:
    checks = number is not None
    learn.learn(Namespace(start=None, number=number, check=checks, hint=False, mine=False))


class Policies:
    """--eviction NAME|FILE:FUNCTION: only a file that is named is loaded."""

    def __init__(self, place: Path):
        self.file = place / "policy.py"
        self.file.write_text("def mine(seqs):\n    return 0\n\nVALUE = 1\n")
        self.words = [str(self.file), str(place), "a" * 300, *invented.TEXTS]
        self.words += ": : mine VALUE least_recently_used ~ ~x / .. __builtins__".split()

    def __call__(self, rng: Random) -> None:
        text = "".join(rng.choices(self.words, k=rng.randrange(5)))
        policies.find_policy(rng.choice([*policies.KINDS]), text)


class Guides:
    """A request's guide."""

    REGEX = list("()[]{}*+?|.\\^$apsdw=!<>:0129,PLé-&~") + [
        "(?",
        "\\p{L}",
        "{1,999}",
        "(?i:",
        "\\b",
    ]
    SCHEMA = {
        "type": "object", "required": ["a"], "additionalProperties": False,
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x"]},
                       "c": {"type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 3},
                       "e": {"type": "string", "pattern": "^a+$", "maxLength": 4}},
        "$defs": {"d": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
    }  # fmt: skip

    def __init__(self, place: Path):
        pytest.importorskip("llguidance")

    def __call__(self, rng: Random) -> None:
        match rng.randrange(4):
            case 0:
                guide = {"regex": "".join(rng.choices(self.REGEX, k=rng.randrange(12)))}
            case 1:
                guide = {"json": invented.changed(rng, self.SCHEMA)}
            case 2:
                guide = {"choices": invented.changed(rng, ["yes", "no", "a b"])}
            case 3:
                guide = invented.changed(rng, {"json": {"type": "null"}, "regex": None})
        SamplingParams(guide=guide)


KINDS = {
    "checkpoints": Checkpoints, "metas": Metas, "tokenizers": Tokenizers, "JSONL": JsonLines,
    "Parquet": Parquet, "traces": Traces, "expressions": Expressions, "Hugging Face": Folders,
    "quantised": Quantised, "states": States, "policies": Policies, "guides": Guides,
}  # fmt: skip
MANY = [*KINDS][:7]  # the others are tried a fifth as often


@pytest.mark.parametrize("name", KINDS)
def test_many_of(name, guard, request, place):
    guard.place, guard.begin, kind = str(place), 0, KINDS[name]
    if kind is Traces:
        kind.given = request.getfixturevalue("events")[:25]
    many = CASES if name in MANY else CASES // 5
    case, refused, worst, count = kind(place), 0, (0, 0), many or 150
    told, began = io.StringIO(), time.process_time()
    for number in range(-99, count):  # the first ones import what is imported late
        rng = Random(number)
        try:
            with redirect_stdout(told), redirect_stderr(told), guard:
                case(rng)
        except REFUSALS as error:
            refused += number >= 0
            assert len(str(error)) < 3000, error
        except BaseException as error:
            raise AssertionError(f"{name}, Random({number}): {error!r:.300}") from error
        told.seek(0)
        told.truncate()
        worst = max(worst, (guard.peak, number))
        files = 3 * sum(f.stat().st_size for f in place.iterdir()) if guard.peak > MEMORY else 0
        assert guard.peak <= MEMORY + files, f"{name}, Random({number}): {guard.peak:,} bytes"
        assert number < 0 or not guard.ran, f"{name}, Random({number}) ran {guard.ran!s:.200}"
        guard.ran.clear()
    assert not (place / "ran").exists()
    took = time.process_time() - began
    print(f"\n{name}: {count:,} cases, {refused:,} refused, {worst[0] / 2**20:.1f} MB at most "
          f"(case {worst[1]}), {1e6 * took / count:.0f} us each")  # fmt: skip
    assert 0 < refused < count
