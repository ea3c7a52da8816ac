"""Sequences of calls and changes, drawn and shrunk: the steps, the state that they change, and the scenario
sequence.calls."""
