"""Command lines of the data package, one file each: a docstring whose first line is the summary, `add_arguments`, `run`.

`run(arguments)` returns an exit code; errors have been printed by then. `main(arguments)` parses as well: `python -m data.<name>`.
"""
