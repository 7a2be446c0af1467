"""The tool that counts identifiers."""

import sys

from helpers.goldens import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import measure_code

SOURCE = '''"""A module
of two lines."""

import math  # code with a comment


# a comment
def area(radius, *, unit=1.0):
    """A docstring."""
    text = """a string
    that is code"""
    return math.pi * radius**2 * unit


def wide(a, b, c, d, e, f, g, h, i):
    return area(*[a], unit=b)
'''


def test_lines_and_identifiers_are_counted():
    measure = measure_code.measure_source(SOURCE)
    assert measure.num_lines == 16
    assert measure.num_code_lines == 1 + 4 + 2
    # radius unit; text; math math.pi radius unit; a to i; area a unit b
    assert measure.num_identifiers == 2 + 1 + 4 + 9 + 4
    assert measure.num_functions == 2 and measure.longest_function == 5
    assert measure.num_wide_functions == 1 and measure.num_positional_calls == 0
    assert measure_code.measure_source("f(1, 2, 3, 4, 5, 6, 7)\n").num_positional_calls == 1


def test_measures_add_up(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(SOURCE)
    both = measure_code.measure_files(measure_code.find_files(tmp_path))
    assert both.num_lines == 32 and both.num_functions == 4 and both.longest_function == 5
    assert both.density == measure_code.measure_source(SOURCE).density


def test_the_design_has_the_table_of_all_files_of_the_core():
    design = measure_code.DESIGN.read_text(encoding="utf-8")
    for line in measure_code.make_core_table().splitlines():
        name = line.split("|")[1]
        assert f"|{name}|" in design
