"""A kernels/ with one small layer, and bugs for it that hang, crash, take all memory or change nothing."""

KERNEL = '''
"""A layer in plain torch that computes in float64."""

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
_CORRECT = "total = torch.zeros(x.shape, dtype=torch.float64)"
_BUGS = {
    "a-unnoticed": (f"{_CORRECT}  # unchanged", ""),
    "b-explained": (f"{_CORRECT}  # unchanged", 'survives = "it is the correct kernel"'),
    "wrong": (f"{_CORRECT} + 1", ""),
    "hangs": (f"{_CORRECT}\n    while True:\n        pass", ""),
    "dies": (f"{_CORRECT}\n    import os\n    os.kill(os.getpid(), 11)", ""),
    "hungry": (f"{_CORRECT}\n    hoard = []\n    while True:\n        hoard.append(bytearray(1 << 26))", ""),
    "raises": (f"{_CORRECT}\n    raise ValueError('no')", ""),
    "no-program": (f"{_CORRECT} + undefined_name", ""),
    "meant-to-raise": (f"{_CORRECT} + undefined_name", 'raises = "NameError"'),
    "elsewhere": (f"{_CORRECT}  # unchanged", 'device = "cuda"'),
}
_CONTROLS = {
    "another-order": (_CORRECT + "\n    topk_ids = topk_ids.flip(1)\n    topk_weights = topk_weights.flip(1)", "")
}

DRIVER = """
import sys
from pathlib import Path
from harness.mutate import bugs, protocol
protocol.MEMORY = 4 << 30
bugs.KERNELS, bugs.BUGS = Path(sys.argv[1]) / "kernels", Path(sys.argv[1]) / "bugs"
from harness.cli import main
sys.exit(main(["mutate", *sys.argv[2:]]))
"""


def write(directory):
    """Write kernels/ and bugs/ into `directory`."""
    (directory / "kernels").mkdir()
    (directory / "kernels" / "__init__.py").write_text("")
    (directory / "kernels" / "tiny.py").write_text(KERNEL)
    (directory / "bugs").mkdir()
    for kind, entries in (("made_up", _BUGS), ("controls", _CONTROLS)):
        family = "layers" if kind == "made_up" else "any"
        text = [
            _ENTRY.format(name=name, number=n, new=new, family=family, more=more)
            for n, (name, (new, more)) in enumerate(entries.items())
        ]
        (directory / "bugs" / f"{kind}.toml").write_text("\n".join(text))
