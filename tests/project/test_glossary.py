"""docs/GLOSSARY.md is short, and speaks of what there is."""

import re

from helpers.goldens import PACKAGE, ROOT

TEXT = (ROOT / "docs" / "GLOSSARY.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|`]+) \| (.+) \| `(\w+)` in `([\w/]+\.py)` \|$", TEXT, re.M)


def test_every_word_has_two_sentences_and_a_home_that_exists():
    table = [line for line in TEXT.splitlines() if line.startswith("| ")]
    assert len(ROWS) == len(table) - 1 and 20 < len(ROWS) <= 35  # but for the head
    for word, meaning, name, file in ROWS:
        assert len(re.findall(r"\.(?: |$)", meaning)) == 2, word
        source = (PACKAGE / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(?:def|class) {name}\b", source, re.M), (word, name, file)
    assert len({word for word, *_ in ROWS}) == len(ROWS)
