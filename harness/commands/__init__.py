"""Subcommands of the command line that have a module of their own: `register(add)` declares a command's arguments.

These modules are imported at every start of the command line, so what is slow to import is imported where it is used.
"""
