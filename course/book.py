"""Make course/book.html, one static page of all steps to read or print: `python course/book.py`.

The input is the pages of this folder, NN-name.md, in order. Neither this program nor the book needs
packages or the network. It supports the Markdown that the pages use: headings, paragraphs, lists,
tables, fenced code, quotations, links, emphasis and code. Raw HTML tags are shown as text.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
BOOK = HERE / "book.html"
STYLE = """
:root { color-scheme: light dark; --ink: #1c1f25; --soft: #565c69; --bg: #fffefb; --wash: #f2f0e9;
  --line: #d9d5ca; --link: #0a5bd0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e7e2; --soft: #a9afba; --bg: #14171c;
  --wash: #1f242c; --line: #333a44; --link: #74b4ff; } }
body { margin: 0 auto; max-width: 46rem; padding: 1rem 1.2rem 4rem; background: var(--bg);
  color: var(--ink); font: 17px/1.55 Georgia, "DejaVu Serif", serif; }
h1, h2, h3, nav, th { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { line-height: 1.2; margin-top: 2.5rem; }
a { color: var(--link); }
code, pre { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .86em; background: var(--wash); border-radius: 4px; padding: .05em .25em; }
pre { background: var(--wash); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  line-height: 1.3; }
pre code { padding: 0; background: none; font-size: 13px; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: 3px solid var(--line); }
section { border-top: 1px solid var(--line); }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #333; --bg: #fff; --wash: #f4f4f4;
    --line: #999; --link: #000; }
  body { max-width: none; font-size: 11pt; padding: 0; }
  section { break-before: page; border: 0; }
  pre, table, blockquote { break-inside: avoid; }
  pre code { font-size: 8pt; }
  h1, h2, h3 { break-after: avoid; }
}
"""
LIST = re.compile(r"( *)(?:[-*+]|(\d+)[.)]) +(.*)")


def chapter(name: str) -> str:
    """The id of a page in the book."""
    return "step-" + name.removesuffix(".md")


def inline(text: str) -> str:
    """Convert code, links and emphasis in a line of text; escape the rest."""
    pieces: list[str] = []  # HTML that must not be escaped

    def keep(piece: str) -> str:
        pieces.append(piece)
        return f"\0{len(pieces) - 1}\0"

    def link(match: re.Match) -> str:
        address = html.unescape(match[2])
        if re.fullmatch(r"\d\d-[\w-]+\.md", address):  # another page of the book
            address = "#" + chapter(address)
        if not re.match(r"https?://|#|[\w./-]+$", address):
            raise ValueError(f"the link {address!r} is neither a web address nor a file")
        return keep(f'<a href="{html.escape(address)}">') + match[1] + keep("</a>")

    text = text.replace("\0", "")
    text = re.sub(r"(`+)(.+?)\1", lambda m: keep(f"<code>{html.escape(m[2].strip())}</code>"), text)
    text = html.escape(text, quote=False)
    text = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)
    text = re.sub(r"\*\*(?=\S)(.+?)(?<=\S)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<![\w*])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*])", r"<em>\1</em>", text)
    return re.sub("\0(\\d+)\0", lambda m: pieces[int(m[1])], text)


def render(lines: list[str]) -> list[str]:
    """Convert lines of Markdown to lines of HTML."""
    out: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        if line.startswith("```"):
            end = next((k for k in range(i + 1, len(lines)) if lines[k].startswith("```")), None)
            if end is None:
                raise ValueError(f"the fence {line!r} is not closed")
            code = html.escape("\n".join(lines[i + 1 : end]), quote=False)
            out.append(f'<pre tabindex="0"><code>{code}</code></pre>')
            i = end + 1
        elif title := re.fullmatch(r"(#{1,4}) +(.+)", line):
            level = len(title[1])
            out.append(f"<h{level}>{inline(title[2])}</h{level}>")
            i += 1
        elif line.startswith("|"):
            end = i
            while end < len(lines) and lines[end].startswith("|"):
                end += 1
            out += table(lines[i:end])
            i = end
        elif line.startswith(">"):
            end = i
            while end < len(lines) and lines[end].startswith(">"):
                end += 1
            inner = [re.sub("^> ?", "", row) for row in lines[i:end]]
            out += ["<blockquote>", *render(inner), "</blockquote>"]
            i = end
        elif LIST.match(line):
            end = i
            while end < len(lines) and (LIST.match(lines[end]) or lines[end].startswith("  ")):
                end += 1
            out += items(lines[i:end])
            i = end
        elif not line.strip() or line.startswith("<!--"):
            i += 1
        else:
            end = i + 1
            begins = re.compile(r"```|#{1,4} |\||>|<!--")
            while end < len(lines) and lines[end].strip() and not begins.match(lines[end]):
                if LIST.match(lines[end]):
                    break
                end += 1
            out.append(f"<p>{inline(' '.join(row.strip() for row in lines[i:end]))}</p>")
            i = end
    return out


def table(rows: list[str]) -> list[str]:
    """Convert a table. If its second row is a rule, the first row is the head."""
    cells = [re.split(r"(?<!\\)\|", row.strip().strip("|")) for row in rows]
    rule = len(rows) > 1 and re.fullmatch(r"[\s|:-]+", rows[1])
    out = ["<table>"]
    for number, row in enumerate(cells):
        if not (rule and number == 1):
            tag = "th" if rule and number == 0 else "td"
            texts = (inline(cell.strip().replace(r"\|", "|")) for cell in row)
            out.append(f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>")
    return [*out, "</table>"]


def items(lines: list[str]) -> list[str]:
    """Convert a list. Indented lines belong to the item before them."""
    first = LIST.match(lines[0])
    tag, depth = ("ol" if first[2] else "ul"), len(first[1])
    out, entries = [f"<{tag}>"], []
    for line in lines:
        item = LIST.match(line)
        if item and len(item[1]) <= depth:
            entries.append([item[3]])
        else:
            entries[-1].append(line[min(len(line) - len(line.lstrip()), depth + 4) :])
    for text, *inner in entries:
        nested = next((k for k, row in enumerate(inner) if LIST.match(row)), len(inner))
        words = " ".join([text, *(row.strip() for row in inner[:nested])])
        deeper = items(inner[nested:]) if nested < len(inner) else []
        out += [f"<li>{inline(words)}", *deeper, "</li>"]
    return [*out, f"</{tag}>"]


def make(folder: Path = HERE) -> str:
    """The book of a folder's pages. Raises ValueError, with the name of the page, for a page
    without a title or with a broken link, and if there is no page."""
    names, chapters = [], []
    for path in sorted(folder.glob("[0-9][0-9]-*.md")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if not lines or not lines[0].startswith("# "):
            raise ValueError(f"{path.name}: the first line must be a title, `# Step N: Title`")
        try:
            body = render(lines)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        names.append((chapter(path.name), inline(lines[0][2:])))
        chapters += [f'<section id="{names[-1][0]}">', *body, "</section>"]
    if not names:
        raise ValueError(f"{folder} has no pages: name them like 01-naive.md")
    title = "From a naive loop to an engine"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<header><h1>{title}</h1>",
            "<p>The course of microvllm, made by <code>python course/book.py</code>.</p></header>",
            '<nav aria-label="Contents"><ol>',
            *(f'<li><a href="#{name}">{text}</a></li>' for name, text in names),
            "</ol></nav>\n<main>",
            *chapters,
            "</main>\n</body>\n</html>\n",
        ]
    )


if __name__ == "__main__":
    try:
        BOOK.write_text(make(), encoding="utf-8")
    except ValueError as error:
        sys.exit(f"book.py: {error}")
    print(f"written: {BOOK}")
