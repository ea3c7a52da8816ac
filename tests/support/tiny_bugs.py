"""A made-up kernels/ of one small layer, and bugs for it that are as bad as bugs can be."""

KERNEL = '''
"""A layer in plain torch, in float64 inside."""

import torch


class Tiny:
    name = "tiny"
    devices = {"cpu"}

    def supports(self, problem):
        plain = (problem.quant, problem.activation, problem.limit) == (None, "silu", None)
        plain = plain and (problem.layout, problem.ep) == ("nk", None)
        more = problem.bias or problem.router_weight_on_input or problem.shared_experts
        return None if plain and not more else "shape: plain layers only"

    def prepare(self, problem, layer):
        def call(x, topk_weights, topk_ids, out=None):
            return combine(x, topk_weights, topk_ids, layer)

        return call


def combine(x, topk_weights, topk_ids, layer):
    total = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(len(layer.w13)):
        token, slot = torch.nonzero(topk_ids == expert, as_tuple=True)
        gate, up = (x[token].double() @ layer.w13[expert].double().T).chunk(2, dim=1)
        y = (torch.nn.functional.silu(gate) * up) @ layer.w2[expert].double().T
        total.index_add_(0, token, y * topk_weights[token, slot, None].double())
    return total.to(x.dtype)
'''

_ENTRY = """
[{name}]
source = "made#{number}"
edit = "tiny.py:combine"
old = "total = torch.zeros(x.shape, dtype=torch.float64)"
new = '''{new}'''
reveals = "{family}"
backends = "kernels.tiny:Tiny"
{more}
"""
_RIGHT = "total = torch.zeros(x.shape, dtype=torch.float64)"
_BUGS = {
    "a-unnoticed": (f"{_RIGHT}  # as it was", ""),
    "b-explained": (f"{_RIGHT}  # as it was", 'survives = "it is the right kernel"'),
    "wrong": (f"{_RIGHT} + 1", ""),
    "hangs": (f"{_RIGHT}\n    while True:\n        pass", ""),
    "dies": (f"{_RIGHT}\n    import os\n    os.kill(os.getpid(), 11)", ""),
    "hungry": (f"{_RIGHT}\n    hoard = []\n    while True:\n        hoard.append(bytearray(1 << 26))", ""),
    "raises": (f"{_RIGHT}\n    raise ValueError('no')", ""),
    "no-program": (f"{_RIGHT} + nothing_of_that_name", ""),
    "meant-to-raise": (f"{_RIGHT} + nothing_of_that_name", 'raises = "NameError"'),
    "elsewhere": (f"{_RIGHT}  # as it was", 'device = "cuda"'),
}
_CONTROLS = {
    "another-order": (_RIGHT + "\n    topk_ids = topk_ids.flip(1)\n    topk_weights = topk_weights.flip(1)", "")
}

DRIVER = """
import sys
from pathlib import Path
from harness.mutate import asking, bugs
asking.MEMORY = 4 << 30
bugs.KERNELS, bugs.BUGS = Path(sys.argv[1]) / "kernels", Path(sys.argv[1]) / "bugs"
from harness.cli import main
sys.exit(main(["mutate", *sys.argv[2:]]))
"""


def write(room):
    """kernels/ and bugs/ under the directory `room`."""
    (room / "kernels").mkdir()
    (room / "kernels" / "__init__.py").write_text("")
    (room / "kernels" / "tiny.py").write_text(KERNEL)
    (room / "bugs").mkdir()
    for kind, entries in (("made_up", _BUGS), ("controls", _CONTROLS)):
        family = "layers" if kind == "made_up" else "any"
        text = [
            _ENTRY.format(name=name, number=n, new=new, family=family, more=more)
            for n, (name, (new, more)) in enumerate(entries.items())
        ]
        (room / "bugs" / f"{kind}.toml").write_text("\n".join(text))
