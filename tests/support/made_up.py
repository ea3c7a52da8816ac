"""The text of a module of backends that compute nothing, for tests with made-up verdicts."""

from harness.run.worker import import_all

import_all()  # pytester forgets what a run imports, and torch._dynamo cannot be imported twice

MINE = """
import os

class Mine:
    name = "mine"
    devices = {"cpu"}
    def prepare(self, problem, layer): ...

class Other(Mine):
    name = "other"

class Contract(Mine):
    name, devices, xpu_contract = "contract", {"cpu", "xpu"}, True

class Ends(Mine):
    name = "ends"
    def supports(self, problem):
        os._exit(3)

class Elsewhere(Mine):
    name, devices = "elsewhere", {"cuda"}
"""
