"""Commands of other programs, as commands of `rlhf-run`.

A `Call` is a parsed shell line (`shell`), a `Program` is the knowledge of the program that it calls (`programs`, and a
table per dialect: `openrlhf`, `repulse`, `rlhflow`, `trl`, `verl`), and a `Draft` is the new command on its way
(`draft`). Flags that decide together go through rules. Each of the others has one answer: the dialect's own, or that of
`config.foreign_flags`.
"""
