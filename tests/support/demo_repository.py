"""A git repository with a history of lost speed: a copy of kernels/, and commits, most of them harmless.

Each story is one commit that looks like a clean-up. Every output stays right:

    low_latency  the path for small batches is lost in a refactoring (vLLM PR #39016 restored it)
    permute      the permutation's buffers are allocated on every call (PR #43014 kept them)
    instance     the cached instance is built on every call (PR #42915 cached it)
    on_input     the router weight is multiplied into a copy of the input (as SGLang's XPU path did for Llama 4)
    transpose    weights are transposed in memory on every call (PR #40109 moved that to loading)
    config       the tuned tiles of small batches are lost: the default ones are taken
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harness.base.processes import ROOT

BACKENDS = '''\
"""The layer as a model calls it."""

from kernels.layer import DTYPES
from kernels.triton.backend import TritonMoE, arguments
from kernels.triton.fused_moe import fused_moe, permuted_moe
from kernels.triton.permute import MoEPermuteScratch


class Fused(TritonMoE):
    """fused_moe, which takes the path that it likes."""

    name = "fused"

    def expected_launches(self, problem):
        return set(), set()


class Permuted(Fused):
    """permuted_moe with one scratch for all calls."""

    name = "permuted"

    def plans(self, problem):
        return [{**plan, "weight": "after_store"} for plan in super().plans(problem)]

    def prepare(self, problem, layer):
        scratch = MoEPermuteScratch(
            problem.tokens, problem.top_k, problem.num_experts, device=layer.w13.device,
            hidden_size=problem.hidden_size, hidden_dtype=DTYPES[problem.dtype],
        )

        def call(hidden_states, topk_weights, topk_ids, out=None):
            return permuted_moe(
                hidden_states, layer.w13, layer.w2, topk_weights, topk_ids, out=out, scratch=scratch, **arguments(layer)
            )

        return call
'''


@dataclass(frozen=True)
class Edit:
    """One commit. It replaces `old`, which occurs exactly once in a file, by `new`; an empty `old` creates the file."""

    subject: str
    path: str
    old: str
    new: str
    story: str = ""


GEMM, FUSED, LAYER = "kernels/triton/gemm.py", "kernels/triton/fused_moe.py", "kernels/layer.py"
CACHED, PERMUTE = "kernels/cached.py", "kernels/triton/permute.py"

HISTORY = (
    Edit("Backends of this package", "kernels/demo.py", "", BACKENDS, "good"),
    Edit("One rule for tiles", FUSED, "    if low_latency:\n        return low_latency_config(dtype)\n", "", "config"),
    Edit("A table of known devices", "kernels/known.py", "", 'KNOWN = ("H100", "H200", "B200")\n'),
    Edit("combine: name of the tile", "kernels/triton/combine.py", "BLOCK_TOKENS = 4\n",
         "#: Tokens a program adds up.\nBLOCK_TOKENS = 4\n"),
    Edit("make_layer: weights dense in memory", LAYER, "        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)\n",
         "        w13, w2 = w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()\n", "transpose"),
    Edit("layer: the docstring names the layouts", LAYER, "Every kernel here takes these arguments",
         "Layouts: nk and kn. Every kernel here takes these arguments"),
    Edit("activation: shorter name for a constant", "kernels/triton/activation.py", "BLOCK_PAIRS = 8\n",
         "PAIRS = 8\nBLOCK_PAIRS = PAIRS\n"),
    Edit("Router weights in one place", FUSED,
         '        h = linear(x, None, "none", layer.w13, top_k, on_input, "input")\n',
         "        if on_input is not None:\n            x = x * on_input.reshape(-1, 1).to(x.dtype)\n"
         '        h = linear(x, None, "none", layer.w13, top_k, None, "none")\n', "on_input"),
    Edit("WIP", GEMM, "def default_config(", "def default_config((", "broken"),
    Edit("Fix the merge", GEMM, "def default_config((", "def default_config("),
    Edit("Paths by name", FUSED,
         '        low_latency = path == "low_latency" or (\n            path == "auto" and takes_low_latency_path('
         "len(ids), ids.shape[1], layer.num_experts, expert_map)\n        )\n",
         '        low_latency = path == "low_latency"\n', "low_latency"),
    Edit("fused_moe: equal, but shorter", FUSED, "    num_pairs = num_tokens * top_k\n    quantized",
         "    num_pairs = ids.numel()\n    quantized"),
    Edit("permuted_moe: arguments in order", FUSED, "expert_map=layer.expert_map, scratch=scratch,\n        num_local",
         "expert_map=layer.expert_map,\n        num_local", "permute"),
    Edit("permute: comment", PERMUTE, "BLOCK_ROWS = 4\n", "# Rows a program moves.\nBLOCK_ROWS = 4\n"),
    Edit("quant: unused helper", "kernels/triton/quant.py", "def partial_amax(",
         "def _unused(x):\n    return x\n\n\ndef partial_amax("),
    Edit("Notes for maintainers", "NOTES.md", "", "Kernels are in kernels/.\n"),
    Edit("cached: no state between prepare and call", CACHED,
         "            instance.apply(out, hidden_states, topk_weights, topk_ids)\n",
         "            CachedFusedMoE(layer).apply(out, hidden_states, topk_weights, topk_ids)\n", "instance"),
    Edit("cached: a word", CACHED, "replaced weights are freed at once.", "replaced weights go at once."),
)  # fmt: skip


def git(repository: Path, *arguments: str) -> str:
    """The output of git in a repository, without any configuration of the user."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith("GIT_")}
    names = {f"GIT_{who}_{what}": v for who in ("AUTHOR", "COMMITTER") for what, v in (("NAME", "D"), ("EMAIL", "d@d"))}
    clean |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, **names}
    return subprocess.run(
        ["git", *arguments], cwd=repository, env=clean, check=True, capture_output=True, text=True
    ).stdout.strip()


def apply(repository: Path, edit: Edit) -> None:
    """Apply an edit. Raises ValueError if the old text does not occur exactly once: the kernels have changed."""
    file = repository / edit.path
    text = file.read_text() if file.exists() else ""
    count = text.count(edit.old) if edit.old else int(not text)
    if count != 1:
        raise ValueError(f"{edit.subject!r}: {edit.old!r} occurs {count} times in {edit.path}, not once")
    file.write_text(text.replace(edit.old, edit.new) if edit.old else edit.new)


def build(repository: Path) -> dict[str, str]:
    """Create the repository. Returns the commits by story, and by "good", "bad" and "broken" (not valid Python)."""
    shutil.copytree(ROOT / "kernels", repository / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    git(repository, "init", "-q", "-b", "main")

    def commit(subject: str) -> str:
        git(repository, "add", "-A")
        git(repository, "commit", "-q", "-m", subject)
        return git(repository, "rev-parse", "HEAD")

    stories = {}
    commit("The kernels")
    for edit in HISTORY:
        apply(repository, edit)
        sha = stories["bad"] = commit(edit.subject)
        stories |= {edit.story: sha} if edit.story else {}
    return stories
