"""Confined processes that run a generated program and its tests, for `--reward code`.

* `keeper` starts the processes, keeps their time and collects what they answer.
* `program` runs the generated program: as a server of calls, or with an input and an output.
* `examiner` runs the tests, in another process, and reaches the program by calls alone (`remote`, `names`).
* `wire` is the form of values between the two.
* `confinement` takes from a process what it does not need (`landlock`, `syscalls`).

Nothing here imports torch, or anything else that is slow: a keeper starts for each sample.
"""
