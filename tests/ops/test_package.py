"""What importing the ops costs."""

from __future__ import annotations

import subprocess
import sys


def test_import_loads_no_triton_and_no_models():
    code = "import sys, outrider.ops; print([m for m in ('triton', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
