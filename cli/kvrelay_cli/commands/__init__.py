"""One file per command, imported only when it runs. Each has `EPILOG`, `add_arguments(parser)` and `run(args)`."""
