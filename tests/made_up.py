"""A module of backends that compute nothing: for tests in which verdicts are made up."""

MINE = """
class Mine:
    name = "mine"
    devices = {"cpu"}
    def prepare(self, problem, layer): ...

class Other(Mine):
    name = "other"

class Contract(Mine):
    name, devices, xpu_contract = "contract", {"cpu", "xpu"}, True

class Elsewhere(Mine):
    name, devices = "elsewhere", {"cuda"}
"""
