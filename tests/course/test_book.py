"""course/book.html is what course/book.py makes of the pages, and needs nothing else."""

import importlib.util
import re
from html.parser import HTMLParser

import pytest
from helpers.goldens import ROOT

spec = importlib.util.spec_from_file_location("book", ROOT / "course" / "book.py")
book = importlib.util.module_from_spec(spec)
spec.loader.exec_module(book)

PAGE = """# Step 1: A `loop` & more

A *word*, **two words**, `code * with <tags>` and 2 * 3 * 4, see [step 2](02-next.md)
or [the paper](https://arxiv.org/abs/2309.06180).
- one
- two, which
  goes on
  - deeper

1. first
2. second

| a | b |
|---|--:|
| `x \\| y` | <b>raw</b> |

> quoted

```text
# no *title* & <kept>

| as it is |
```
"""


class Checker(HTMLParser):
    """Fails where tags are not closed in their order; collects what leads elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids = [], [], set()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert not {"src", "onclick", "srcset"} & found.keys()
        self.links += [found["href"]] if "href" in found else []
        self.ids |= {found["id"]} if "id" in found else set()
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert {link[1:] for link in checker.links if link[0] == "#"} <= checker.ids
    assert not re.search(r"<(script|img|link|iframe)|@import|url\(", text)
    return checker


def test_what_the_pages_use_becomes_html(tmp_path):
    (tmp_path / "01-naive.md").write_text(PAGE)
    (tmp_path / "02-next.md").write_text("# Step 2: Next\n\nEnd.\n")
    made = book.make(tmp_path)
    checker = checked(made)
    assert "https://arxiv.org/abs/2309.06180" in checker.links and "#step-02-next" in checker.links
    for part in (
        "<h1>Step 1: A <code>loop</code> &amp; more</h1>", "<em>word</em>",
        "<strong>two words</strong>", "<code>code * with &lt;tags&gt;</code> and 2 * 3 * 4",
        "<li>two, which goes on\n<ul>\n<li>deeper\n</li>\n</ul>\n</li>",
        "<ol>\n<li>first\n</li>\n<li>second\n</li>\n</ol>", "<th>a</th><th>b</th>",
        "<td><code>x | y</code></td><td>&lt;b&gt;raw&lt;/b&gt;</td>",
        "<blockquote>\n<p>quoted</p>\n</blockquote>",
        "<pre tabindex=\"0\"><code># no *title* &amp; &lt;kept&gt;\n\n| as it is |</code></pre>",
    ):  # fmt: skip
        assert part in made, part
    assert "prefers-color-scheme: dark" in made and "@media print" in made


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no title\n", "title"),
        ("# A\n\n```\nopen\n", "not closed"),
        ("# A\n\n[x](javascript:alert)\n", "javascript"),
    ],
)
def test_a_page_that_is_wrong_is_named(tmp_path, text, told):
    with pytest.raises(ValueError, match="no page"):
        book.make(tmp_path)
    (tmp_path / "03-wrong.md").write_text(text)
    with pytest.raises(ValueError, match=rf"03-wrong\.md: .*{told}"):
        book.make(tmp_path)


def test_the_book_is_made_of_the_pages():
    if not list((ROOT / "course").glob("[0-9][0-9]-*.md")):
        pytest.skip("there is no page yet")
    made = book.make()
    checked(made)
    assert book.BOOK.read_text(encoding="utf-8") == made, "run `python course/book.py` once more"
