"""Sequences of calls and changes, drawn and shrunk: the rules, the state, the scenario."""
