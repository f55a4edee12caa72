"""Makes the module that the tests share importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # `scripted`, for the tests
