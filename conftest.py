"""Set up all tests: messages as a user sees them, and no deadlines that a busy machine misses."""

import logging
from importlib.util import find_spec

from rlhf_core.util.messages import console, log

log.setLevel(logging.INFO)  # a user has no handler of their own; pytest's root handlers hide that
log.addHandler(console)

if find_spec("hypothesis"):  # absent where the checks for GPUs run
    from hypothesis import settings

    settings.register_profile("any load", settings(), deadline=None)
    settings.load_profile("any load")
