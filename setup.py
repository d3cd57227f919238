"""The build's shim: everything is said in pyproject.toml and CMakeLists.txt."""

from pathlib import Path

from setuptools import setup

setup(cmake_source_dir=str(Path(__file__).parent))
