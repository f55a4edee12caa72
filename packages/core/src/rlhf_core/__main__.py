"""`python -m rlhf_core` is `rlhf-run`."""

from __future__ import annotations

import sys

from rlhf_core.cli import main

sys.exit(main())
