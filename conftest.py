"""Tests see messages on the console, as a user without a handler of their own does; pytest's root handlers hide that."""

import logging

from rlhf_core.util.messages import console, log

log.setLevel(logging.INFO)
log.addHandler(console)
