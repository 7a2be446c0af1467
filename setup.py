"""Build: what pyproject.toml says, and for a wheel the folders that a clone has beside src/.

They become microvllm/share/ in the wheel, where cli/bench.py looks for them. An editable install
needs no copy.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHARE = ["lab", "course", "models"]  # those that are there


class BuildWithShare(build_py):
    """build_py, and then the folders."""

    def run(self) -> None:
        super().run()
        share = Path(self.build_lib) / "microvllm" / "share"
        shutil.rmtree(share, ignore_errors=True)  # of an earlier build
        for name in () if self.editable_mode else SHARE:
            if (source := Path(__file__).parent / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(source, share / name, ignore=ignored)


setup(cmdclass={"build_py": BuildWithShare})
