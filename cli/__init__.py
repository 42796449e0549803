"""The command line: one module per command, arguments in, text or JSON out."""
