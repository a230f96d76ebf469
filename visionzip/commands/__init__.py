"""The subcommands of `visionzip`, one file each: a docstring whose first line is the summary, `add_arguments`, `run`.

`run(arguments)` returns an exit code (None is 0). A ``ValueError``, ``OSError`` or ``ImportError`` ends it with its message.
"""
