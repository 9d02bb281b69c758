"""Hides Triton from every Python process that has this folder in PYTHONPATH, as on systems where it does not exist."""

import sys

sys.modules["triton"] = None  # type: ignore[assignment]  # find_spec then finds nothing, and importing it fails
