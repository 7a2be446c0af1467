"""Write docs/API.md: every public class and function, from signatures and docstrings.

    python docs/make_api.py

A name is public if a package lists it in `__all__`. The sources are parsed and not imported, so
that the page needs no optional package and is the same on every version of Python.
tests/project/test_api_page.py compares the page with the sources.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "microvllm"
PAGE = ROOT / "docs" / "API.md"
HEAD = """# API reference

Every public class and function, with its signature and docstring. `python docs/make_api.py`
writes this page. For an introduction read [FEATURES.md](FEATURES.md) first; for the hooks of an
extension, [DESIGN.md](DESIGN.md#hooks).
"""
# (module to import, file with its __all__ or its definitions, names that are not in an __all__)
SECTIONS = [
    ("microvllm", "__init__.py", []),
    ("microvllm.nanochat", "nanochat/__init__.py", []),
    ("microvllm.rl", "rl/__init__.py", []),
    ("microvllm.jobs", "jobs/__init__.py", []),
    ("microvllm.evals", "evals/__init__.py", []),
    ("microvllm.trace", "trace/__init__.py", []),
    ("microvllm.runner", "runner.py", ["Extension", "Watcher"]),
    ("microvllm.features.logits_processor", "features/logits_processor.py", ["LogitsProcessor"]),
    ("microvllm.scheduler", "scheduler.py", ["DraftProposer", "youngest", "first_come"]),
    ("microvllm.blocks", "blocks.py", ["least_recently_used"]),
]
# internal methods of LLM, not for callers
INTERNAL = set(
    "open open_model open_tokenizer assemble_parts make_extensions make_rotary_tables "
    "log_what_was_made check_options check make_requests finish_request serve run_requests "
    "assemble allocate plan_step apply_results find_or_open_text open_text collect_finished "
    "make_request render_conversations submit_requests new_events make_output "
    "make_sample_output recover reset read_text_again set".split()
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_internal(name: str) -> bool:
    """Is a method not for callers? One whose name ends in _now is called by a guard alone."""
    return name in INTERNAL or name.endswith("_now")


class Home(NamedTuple):
    """A definition and its file."""

    file: Path
    node: ast.ClassDef | Function | ast.Assign


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def public_names(file: Path) -> list[str]:
    """The names of a file's `__all__`."""
    for node in parse(file).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def module_file(file: Path, level: int, module: str | None) -> Path:
    """The file of a relative import, such as `..engine`, in a file of the package."""
    folder = file.parents[level - 1]
    target = folder.joinpath(*(module or "").split("."))
    return target / "__init__.py" if target.is_dir() else target.with_suffix(".py")


def find(file: Path, name: str) -> Home:
    """The definition of a name that a file defines or imports."""
    tree = parse(file)
    for node in tree.body:
        is_definition = isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if is_definition and node.name == name:
            return Home(file, node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return Home(file, node)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(module_file(file, node.level, node.module), alias.name)
    raise ValueError(f"{file} neither defines nor imports {name}")


def bases_of(home: Home) -> list[Home]:
    """The class and its base classes in the package, the nearest first."""
    homes = [home]
    for base in home.node.bases:
        path = ast.unparse(base)
        if path.startswith(("sampler.", "engine.")):
            module, name = path.split(".")
            homes += bases_of(find(PACKAGE / f"{module}.py", name))
        elif re.search(rf"import .*\b{path}\b|class {path}\b", home.file.read_text("utf-8")):
            try:
                homes += bases_of(find(home.file, path))
            except ValueError:  # a class of another package
                continue
    return homes


def is_decorated(node: Function | ast.ClassDef, name: str) -> bool:
    return any(name in ast.unparse(decorator) for decorator in node.decorator_list)


def signature(name: str, node: Function, is_method: bool) -> str:
    """The signature of a function with types; if it is long, with one argument per line."""
    parts = [with_spaces(part) for part in split_arguments(ast.unparse(node.args))]
    if is_method and not is_decorated(node, "staticmethod"):
        parts = parts[1:]  # self or cls
    is_constructor = node.name == "__init__"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and not is_constructor else ""
    prefix = "await " if isinstance(node, ast.AsyncFunctionDef) else ""
    line = f"{prefix}{name}({', '.join(parts)}){returns}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{prefix}{name}(", *(f"    {part}," for part in parts), f"){returns}"])


def with_spaces(argument: str) -> str:
    """An argument; if it has a type, with spaces around the = of its default."""
    name, colon, rest = argument.partition(": ")
    return f"{name}: {re.sub('(?<![=!<>])=', ' = ', rest, count=1)}" if colon else argument


def split_arguments(text: str) -> list[str]:
    """The arguments of a signature: split at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in (*parts, text[start:].strip()) if part]


def fields_signature(name: str, homes: list[Home]) -> str:
    """The constructor of a dataclass or NamedTuple: the fields of the class and its bases."""
    fields = []
    for home in reversed(homes):
        for node in home.node.body:
            if not isinstance(node, ast.AnnAssign) or node.target.id in ("_", "ClassVar"):
                continue
            if node.value is not None and "init=False" in ast.unparse(node.value):
                continue
            default = "" if node.value is None else f" = {ast.unparse(node.value)}"
            default = re.sub(r"field\(default=(\w+).*\)", r"\1", default)
            fields.append(f"    {node.target.id}: {ast.unparse(node.annotation)}{default},")
    return "\n".join([f"{name}(", *fields, ")"])


def class_signature(home: Home, homes: list[Home]) -> str:
    """The constructor of a class, or the class line if it is only for inheritance."""
    has_fields = is_decorated(home.node, "dataclass")
    has_fields = has_fields or any(ast.unparse(base) == "NamedTuple" for base in home.node.bases)
    if has_fields:
        return fields_signature(home.node.name, homes)
    for base in homes:
        for node in base.node.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                return signature(home.node.name, node, is_method=True)
    return f"class {home.node.name}"


def escape(text: str) -> str:
    """Escape text for Markdown, except quoted code."""
    quoted = re.split(r"(`[^`]*`)", text)
    quoted[::2] = [re.sub(r"([*<|])|(?<!\w)_(?=\w)", r"\\\g<0>", part) for part in quoted[::2]]
    return "".join(quoted)


def is_list(lines: list[str]) -> bool:
    """Are these indented lines `name: text`, with continuation lines indented further?"""
    first = [line for line in lines if line and not line.startswith(" " * 8)]
    return all(re.match(r"    [\w`*, .\"]+: ", line) for line in first)


def markdown(docstring: str) -> str:
    """Convert a docstring to Markdown: an indented list of arguments becomes a list, other indented
    lines become a code block."""
    blocks: list[list[str]] = [[]]
    for line in docstring.split("\n"):
        begins = blocks[-1] and line.startswith("    ") != blocks[-1][0].startswith("    ")
        is_gap = not line and not (blocks[-1] and blocks[-1][0].startswith("    "))
        if is_gap or (line and begins):
            blocks.append([])
        if not is_gap:
            blocks[-1].append(line)
    parts = [render(block, block[0].startswith("    ")) for block in blocks if block]
    return "\n\n".join(part for part in parts if part)


def render(block: list[str], is_indented: bool) -> str:
    """Convert a paragraph, a list, or a code block."""
    if not is_indented:
        return escape(" ".join(block)).strip()
    while block and not block[-1]:
        block.pop()
    if not is_list(block):
        return "\n".join(["```text", *(line[4:] for line in block), "```"])
    items: list[str] = []
    for line in filter(None, block):
        if line.startswith(" " * 8):
            items[-1] += f" {escape(line.strip())}"
        else:
            names, text = line.strip().split(": ", 1)
            items.append(f"- **{escape(names)}**: {escape(text)}")
    return "\n".join(items)


def methods_of(homes: list[Home]) -> dict[str, Function]:
    """The public methods and properties of a class and its bases, by name."""
    found: dict[str, Function] = {}
    for home in homes:
        for node in home.node.body:
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if not is_function or node.name.startswith("_") or is_decorated(node, "overload"):
                continue
            if home.node.name == "LLM" and is_internal(node.name):
                continue
            if home.node.name == "SamplingParams" and is_internal(node.name):
                continue
            found.setdefault(node.name, node)
    return found


def code(text: str) -> str:
    return f"```python\n{text}\n```"


def describe_class(home: Home) -> list[str]:
    homes = bases_of(home)
    parts = [code(class_signature(home, homes)), markdown(ast.get_docstring(home.node) or "")]
    methods = methods_of(homes)
    documented = [
        node
        for node in methods.values()
        if ast.get_docstring(node) or is_decorated(node, "property")
    ]
    for node in documented:
        name = f"{home.node.name}.{node.name}"
        shown = name if is_decorated(node, "property") else signature(name, node, is_method=True)
        if is_decorated(node, "property") and node.returns:
            shown += f": {ast.unparse(node.returns)}"
        parts += [f"#### `{name}`", code(shown), markdown(ast.get_docstring(node) or "")]
    return parts


def describe(name: str, home: Home) -> str:
    """The heading, signature, docstring and methods of a name."""
    node = home.node
    if isinstance(node, ast.ClassDef):
        parts = describe_class(home)
    elif isinstance(node, ast.Assign):
        parts = [code(f"{name} = {ast.unparse(node.value)}")]
    else:
        parts = [code(signature(name, node, is_method=False))]
        parts.append(markdown(ast.get_docstring(node) or ""))
    place = home.file.relative_to(PACKAGE).as_posix()
    return "\n\n".join([f"### `{name}`", f"In `{place}`.", *filter(None, parts)])


def make_page() -> str:
    """The whole page."""
    parts = [HEAD.strip()]
    for package, file, names in SECTIONS:
        path = PACKAGE / file
        parts.append(f"## `{package}`")
        summary = (ast.get_docstring(parse(path)) or "").split("\n\n")[0].split("\n")
        parts.append(escape(" ".join(summary)))
        for name in names or public_names(path):
            parts.append(describe(name, find(path, name)))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"written: {PAGE}")
