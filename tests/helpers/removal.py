"""Removes a feature from a copy of the package, mechanically: its file, the imports from it, and
what is marked with its path (see microvllm/full.py)."""

import ast
import re
from pathlib import Path

MARK = re.compile(r"#\s*(features/\w+\.py(?:,\s*features/\w+\.py)*)\s*$")


def remove(package: Path, *features: str) -> set[str]:
    """Remove features, and those that import them, from a package's folder. features: paths such
    as features/stats.py. Returns the paths of the files that are deleted."""
    gone = with_importers(package, set(features))
    for path in gone:
        (package / path).unlink()
    for file in sorted(package.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        if "features" in source or file.parent.name == "features":
            rest = without(source, gone, file.relative_to(package))
            ast.parse(rest, str(file))
            file.write_text(rest, encoding="utf-8")
    return gone


def with_importers(package: Path, gone: set[str]) -> set[str]:
    """These files of features/ and all others there that import them, but for types alone."""
    while True:
        importers = {
            f"features/{file.name}"
            for file in (package / "features").glob("*.py")
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if imported_feature(node, Path("features", file.name)) in gone
        }
        if importers <= gone:
            return gone
        gone = gone | importers


def imported_feature(node: ast.AST, file: Path) -> str | None:
    """The path of the feature from which a file of the package imports, if it does."""
    if not isinstance(node, ast.ImportFrom) or not node.level:
        return None
    parts = [*file.parent.parts][: len(file.parent.parts) + 1 - node.level]
    parts += (node.module or "").split(".")
    if len(parts) == 2 and parts[0] == "features":
        return f"features/{parts[1]}.py"
    if parts in (["features"], ["features", ""]):
        names = [f"features/{alias.name}.py" for alias in node.names]
        return names[0] if len(names) == 1 else None
    return None


def without(source: str, gone: set[str], file: Path) -> str:
    """A file's source without what belongs to these features."""
    lines = source.splitlines()
    tree = ast.parse(source)
    dropped: set[int] = set()  # numbers of lines, from 1
    for node in ast.walk(tree):
        if imported_feature(node, file) in gone:
            dropped |= lines_of(node)
    blocks = [block for node in ast.walk(tree) for block in statements_in(node)]
    for number, line in enumerate(lines, start=1):
        mark = MARK.search(line)
        if mark is None or gone.isdisjoint(re.split(r",\s*", mark[1])):
            continue
        if line.strip().startswith("#"):
            dropped |= {number, *marked_statements(number, lines, blocks)}
        else:
            dropped.add(number)
    passes = {}  # a block that is empty now needs a statement
    for block in blocks:
        is_empty = all(lines_of(statement) <= dropped for statement in block)
        # the line above is the head of the block, or its docstring
        if is_empty and head_of(block[0], lines) not in dropped:
            passes[first_line(block[0])] = " " * block[0].col_offset + "pass"
    rest = []
    for number, line in enumerate(lines, start=1):
        if number in passes:
            rest.append(passes[number])
        elif number not in dropped:
            rest.append(line)
    return "\n".join(rest) + "\n"


def statements_in(node: ast.AST) -> list[list[ast.stmt]]:
    """The blocks of statements of a node."""
    names = ("body", "orelse", "finalbody")
    blocks = [getattr(node, name, None) for name in names]
    return [block for block in blocks if isinstance(block, list) and block]


def first_line(statement: ast.stmt) -> int:
    """Where a statement begins, with its decorators."""
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *[decorator.lineno for decorator in decorators]])


def head_of(statement: ast.stmt, lines: list[str]) -> int:
    """The number of the last line above a block's first statement that is less indented."""
    number = first_line(statement) - 1
    while number > 0 and indent(lines[number - 1]) >= statement.col_offset:
        number -= 1
    return number


def indent(line: str) -> int:
    """Columns before the first character; of a blank line, more than any."""
    return len(line) - len(line.lstrip()) if line.strip() else 1000


def lines_of(statement: ast.AST) -> set[int]:
    return set(range(first_line(statement), statement.end_lineno + 1))


def marked_statements(number: int, lines: list[str], blocks: list[list[ast.stmt]]) -> set[int]:
    """The lines of the statements below a mark, up to a blank line or another mark."""
    column = len(lines[number - 1]) - len(lines[number - 1].lstrip())
    for block in blocks:
        starts = [first_line(statement) for statement in block]
        below = [start for start in starts if start > number]
        if not below or block[0].col_offset != column:
            continue
        between = lines[number : min(below) - 1]
        if not all(line.strip().startswith("#") for line in between):
            continue
        marked: set[int] = set()
        for statement in block[starts.index(min(below)) :]:
            before = lines[max(marked, default=number) : first_line(statement) - 1]
            if any(not line.strip() or MARK.search(line) for line in before):
                break
            marked |= set(range(max(marked, default=number) + 1, statement.end_lineno + 1))
        return marked
    raise AssertionError(f"line {number} marks nothing: {lines[number - 1]}")
