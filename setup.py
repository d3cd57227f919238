"""The build's shim: CMake builds the C++ library. What the package is stands in pyproject.toml."""

import os

from setuptools import setup

# The Makefile builds the library itself, in place and incrementally, and installs only the Python part here.
if os.environ.get("FASTKERNELS_SKIP_CMAKE") == "1":
    setup()
else:
    setup(cmake_source_dir=".")
