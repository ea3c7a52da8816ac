"""Tools that know nothing of MoE: errors, text, tables, TOML, processes, time limits. Standard library only.

Public: `UserError` (errors.py), and the functions of the other modules.
"""
