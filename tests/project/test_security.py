"""SECURITY.md is kept: the tests that it names exist, and those without a better place are here."""

import json
import os
import re
import shutil
import sys
import zipfile

import pytest
import torch
from helpers.goldens import ERAS, ROOT

from microvllm import LLM, SamplingParams, checkpoint
from microvllm.cli import terminal
from microvllm.loading import find_checkpoint, load_model, read_checkpoint
from microvllm.trace import TEMPLATE, Replay, write_page

CHECKPOINT = ERAS / "era1_padded" / "chatsft_checkpoints" / "d5"
FOLDER = ERAS / "hf_era1_padded"


def test_every_test_that_the_threat_model_names_exists():
    text = (ROOT / "SECURITY.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    tests = ROOT / "tests"
    files = [*tests.rglob("test_*.py"), *tests.glob("helpers/*_cases.py")]
    found = re.findall(r"^ *def (test_\w+)\(", "\n".join(x.read_text() for x in files), re.M)
    assert len(named) > 20
    assert not named - set(found)


def test_every_danger_has_its_test():
    dangers, _, _ = (ROOT / "SECURITY.md").read_text().partition("## Fuzzing")
    rows = [row for row in dangers.splitlines() if row.startswith("| ")]
    assert all("`test_" in row for row in rows if "it could" not in row)


def test_a_compressed_checkpoint_is_refused_before_it_unfolds(tmp_path):
    # three million bytes became six gigabytes before torch found out that they are no pickle
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.pt")
    with zipfile.ZipFile(CHECKPOINT / file.name) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    file.unlink()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, bytes(30 << 20) if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="its records are compressed") as error:
        load_model(tmp_path / "model")
    assert str(file) in str(error.value)


def test_a_json_file_far_too_large_is_not_even_read(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    (meta,) = (tmp_path / "model").glob("*.json")
    os.truncate(meta, 1 << 40)  # sparse: a terabyte of nothing
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/secret.safetensors", "x/secret", "."])
def test_an_index_cannot_point_outside_its_folder(tmp_path, shard):
    folder = tmp_path / "folder"
    shutil.copytree(FOLDER, folder)
    shutil.move(folder / "model.safetensors", tmp_path / "secret.safetensors")
    if shard.startswith("/"):
        shard = str(tmp_path) + shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        read_checkpoint(*find_checkpoint(folder))
    assert str(folder) in str(error.value)


def test_a_home_that_nobody_has_is_no_traceback():
    # pathlib raises RuntimeError for it, which no command takes for a user's mistake
    def find_other(path):
        return LLM(CHECKPOINT, tokenizer_path=path)

    for find in (find_checkpoint, checkpoint.load_model, find_other):
        with pytest.raises(FileNotFoundError, match="nobody-of-this-name"):
            find("~nobody-of-this-name/x")


ORDERS = "\x1b]0;title\x07\x1b[2J\x9b31m"


def test_a_terminal_takes_no_orders_from_a_model(monkeypatch, capsys, tmp_path):
    assert (
        terminal.plain(f"a\tb\n{ORDERS}é\r")
        == "a\tb\n\ufffd]0;title\ufffd\ufffd[2J\ufffd31mé\ufffd"
    )
    tokenizer = ERAS / "tokenizer"
    with LLM(CHECKPOINT, tokenizer_path=tokenizer, num_blocks=40) as llm:
        escape = llm.tokenizer.encode("\x1b")
        params = SamplingParams(max_tokens=4, allowed_token_ids=escape, ignore_eos=True)
        outputs = llm.generate(["a"], params, use_tqdm=False)
        for on_terminal in (True, False):
            monkeypatch.setattr(sys.stdout, "isatty", lambda on=on_terminal: on, raising=False)
            terminal.live(llm, "a", params, chat=False)
            terminal.show_all(["a"], outputs, params, False, False)
            said = capsys.readouterr().out
            assert ("\x1b" in said) is not on_terminal and said.count("\ufffd") == 8 * on_terminal
    # and none from the names in its file
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.pt")
    weights = torch.load(CHECKPOINT / file.name, weights_only=True)
    file.unlink()
    torch.save(weights | {ORDERS: torch.zeros(2)}, file)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path / "model")
    with pytest.raises(SystemExit):
        terminal.Parser(prog="x").error(error.value)
    said = capsys.readouterr().err
    assert "unexpected" in said and "\x1b" not in said and said.count("\n") == 1


MARKUP = "</script><img src=x onerror=alert(1)><!-- ]]> \u2028 \ud800 &lt; ${1} `"


def test_no_markup_of_a_trace_reaches_the_page(tmp_path):
    """Whichever field it is in: the page's source has the `<` of its template, and no other."""
    pool = {"e": "pool", "version": 2, "blocks": 4, "block_size": 2, "hashes": {"1": MARKUP}}
    events = [
        {**pool, "cached": [1], "model": MARKUP, "device": MARKUP, MARKUP: MARKUP},
        {"e": "text", "ids": {"1": MARKUP}},
        {
            "e": "arrive",
            "t": 0,
            "seq": 0,
            "request": 0,
            "sample": 0,
            "prompt": 1,
            "tokens": [1],
        },
        {"e": "finish", "t": 0, "seq": 0, "reason": MARKUP},
    ]
    Replay(events)
    write_page(events, tmp_path / "page.html")
    page, template = ((tmp_path / "page.html").read_text(), TEMPLATE.read_text())
    assert page.count("<") == template.count("<") and "onerror" in page
    # and the page's own script puts text on the page as text alone
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert way not in template, way
