"""Measure the density of the code: python benchmarks/measure_code.py PATH...

A line of code with many names takes long to read. For each file or folder, this program prints
lines, lines of code (without blank lines, comments and docstrings), and identifiers per line of
code: names, attributes, parameters and keywords in calls. It also prints properties that make
functions hard to read: the length of the longest function, the number of calls with more than 6
positional arguments, and the number of functions with more than 8 parameters.

These numbers are for reviewers. No test has a limit for them.

    python benchmarks/measure_code.py                     the core, file by file
    python benchmarks/measure_code.py src/microvllm/cpu   another folder
    python benchmarks/measure_code.py --update            update the table in docs/DESIGN.md
"""

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "microvllm"
DESIGN = ROOT / "docs" / "DESIGN.md"
# in the order of reading
CORE = (
    "blocks scheduler attention runner engine model sampler tokenizer checkpoint __init__ "
    "environment tokenizer_file"
).split()
# identifiers per line of code in other projects, as counted earlier in copies of them
OTHERS = {"nano-vllm": 3.1, "nanochat": 3.9}
MAX_POSITIONAL = 6
MAX_PARAMETERS = 8

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WITH_DOCSTRING = (ast.Module, ast.ClassDef, *FUNCTIONS)
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


@dataclass
class Measure:
    """The counts of one file or of several."""

    num_lines: int = 0
    num_code_lines: int = 0
    num_identifiers: int = 0
    num_functions: int = 0
    longest_function: int = 0  # lines
    num_positional_calls: int = 0  # with more than MAX_POSITIONAL arguments
    num_wide_functions: int = 0  # with more than MAX_PARAMETERS parameters

    @property
    def density(self) -> float:
        """Identifiers per line of code."""
        return self.num_identifiers / max(1, self.num_code_lines)

    def add(self, other: "Measure") -> None:
        """Add another measure."""
        for name, value in vars(other).items():
            if name == "longest_function":
                self.longest_function = max(self.longest_function, value)
            else:
                setattr(self, name, getattr(self, name) + value)


def measure_source(source: str) -> Measure:
    """Measure the text of one file."""
    tree = ast.parse(source)
    measure = Measure(num_lines=source.count("\n"))
    measure.num_code_lines = len(find_code_lines(source) - find_docstring_lines(tree))
    for node in ast.walk(tree):
        if is_identifier(node):
            measure.num_identifiers += 1
        if isinstance(node, FUNCTIONS):
            measure.num_functions += 1
            length = node.end_lineno - node.lineno + 1
            measure.longest_function = max(measure.longest_function, length)
            measure.num_wide_functions += count_parameters(node) > MAX_PARAMETERS
        elif isinstance(node, ast.Call):
            measure.num_positional_calls += len(node.args) > MAX_POSITIONAL
    return measure


def measure_files(files: Iterable[Path]) -> Measure:
    """Measure several files as one."""
    total = Measure()
    for file in files:
        total.add(measure_source(file.read_text(encoding="utf-8")))
    return total


def find_code_lines(source: str) -> set[int]:
    """The numbers of the lines with more than a comment, including docstrings."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def find_docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of the lines of all docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def is_identifier(node: ast.AST) -> bool:
    """Is the node a name, an attribute, a parameter, or the keyword of an argument?"""
    if isinstance(node, ast.keyword):
        return node.arg is not None  # None: **options
    return isinstance(node, (ast.Name, ast.Attribute, ast.arg))


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of parameters, without *args and **kwargs."""
    args = function.args
    return len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)


def find_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def core_files() -> list[Path]:
    return [PACKAGE / f"{name}.py" for name in CORE]


def make_row(name: str, measure: Measure) -> str:
    """One line of the table, in Markdown."""
    cells = [
        name,
        f"{measure.num_lines:,}",
        f"{measure.num_code_lines:,}",
        f"{measure.density:.2f}",
        str(measure.longest_function),
        str(measure.num_positional_calls),
        str(measure.num_wide_functions),
    ]
    return f"| {' | '.join(cells)} |"


def make_table(groups: dict[str, list[Path]]) -> str:
    """A table in Markdown with a line for each group of files."""
    header = (
        "| files | lines | lines of code | identifiers per line of code | longest function "
        f"| calls with over {MAX_POSITIONAL} positional arguments "
        f"| functions with over {MAX_PARAMETERS} parameters |"
    )
    rows = [make_row(name, measure_files(files)) for name, files in groups.items()]
    return "\n".join([header, "|---|---:|---:|---:|---:|---:|---:|", *rows])


def make_core_table() -> str:
    """The core file by file, the whole core, and other projects."""
    groups = {f"`{file.name}`": [file] for file in core_files()}
    groups["**the core**"] = core_files()
    others = [f"| {name} | | | {density} | | | |" for name, density in OTHERS.items()]
    return "\n".join([make_table(groups), *others])


def update_design() -> None:
    """Replace the table of the core in docs/DESIGN.md."""
    text = DESIGN.read_text(encoding="utf-8")
    table = re.compile(r"^\| files \|.*\n(?:\|.*\n)*", re.M)
    new_table = make_core_table() + "\n"
    DESIGN.write_text(table.sub(lambda _: new_table, text, count=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the density of Python code.")
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders (default: the core)")
    parser.add_argument("--update", action="store_true", help="update the table in docs/DESIGN.md")
    args = parser.parse_args()
    if args.update:
        update_design()
    elif args.paths:
        print(make_table({str(path): find_files(path) for path in args.paths}))
    else:
        print(make_core_table())


if __name__ == "__main__":
    main()
