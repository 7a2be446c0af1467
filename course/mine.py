"""Run a step with the reader's function: `microvllm learn N --mine` runs this file.

    python course/mine.py 8 my-course/exercises.py

The reader's function of the exercise replaces the step's own. The step checks that the tokens are
still those of the step before, and prints its counts.
"""

import importlib
import sys
from pathlib import Path

import common
from microvllm.cli.learn import load

STEPS = {  # number of the step: its file, the function of its exercise
    6: ("step06_sharing", "write"),
    8: ("step08_preemption", "victim"),
    9: ("step09_no_phases", "shares"),
}


def grow_with(write):
    """`Pool.grow` of step 6 with the reader's copy-on-write."""

    def grow(pool, seq):
        table, first = seq.table, seq.num_computed // common.BLOCK
        copy = write(pool.ref_count, pool.free, table, first) if first < len(table) else None
        if copy is not None:
            pool.memory.copy(*copy)
            pool.meter.counts["blocks copied"] += 1
        while len(table) * common.BLOCK < len(seq.tokens):
            table.append(pool.allocate())

    return grow


def run(number, exercises, **options):
    """Run a step with a function of `exercises`, the reader's module. Returns the step's result.
    Raises ValueError, with the remedy, if the function is missing or does not work."""
    file, name = STEPS[number]
    step, function = importlib.import_module(file), getattr(exercises, name)
    if name == "write":
        place, name_there, value = step.Pool, "grow", grow_with(function)
    else:
        place, name_there, value = common.mine, name, function
    original = getattr(place, name_there)
    setattr(place, name_there, value)
    try:
        return step.main(**options)
    except NotImplementedError:
        missing = f"you haven't implemented `{name}` yet"
        raise ValueError(f"{missing}: write it, then run this again") from None
    except AssertionError as error:
        raise ValueError(f"with your `{name}` {error}") from None
    except Exception as error:  # the reader's own code may raise anything
        raise ValueError(f"your `{name}` raised {type(error).__name__}: {error}") from None
    finally:
        setattr(place, name_there, original)


def main(number, path):
    name = STEPS[number][1]
    print(f"Step {number} with your `{name}` from {path}.\n", flush=True)
    run(number, load(Path(path)))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2])
    except ValueError as error:
        sys.exit(str(error))
