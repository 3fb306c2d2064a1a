"""The command line. Each command is a module with DESCRIPTION, EXAMPLES, `add_arguments` and `run`."""
