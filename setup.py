"""Puts configs/ into the wheel as rlexit/configs; all else is in pyproject.toml.

The folder lies at the top of the repository, so setuptools' package data cannot reach it. In a checkout it is
read in place (`rlexit.resources`), so an editable install needs no copy.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Builds the packages, then adds the configs."""

    def run(self) -> None:
        """Copies every YAML file below configs/, replacing those of an earlier build."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "rlexit", "configs")
        shutil.rmtree(target, ignore_errors=True)
        source = Path(__file__).parent / "configs"
        for path in sorted(source.rglob("*.yaml")):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithConfigs})
