"""Two commands for `rlhf-run`: `hello` and `likelihood`."""
