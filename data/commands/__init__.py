"""Command lines of the data package: one file a command, each with `main(arguments) -> exit code`."""
