"""The differences between the counts of two calls, as sentences, the most significant first.

A record may lack keys: those that depend on other versions than installed here, or on kernels that were not compiled.
Keys that one of the two records lacks are not compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from harness.perf.count.compiled import kernel_name, settings
from harness.perf.metrics import METRICS

Record = Mapping[str, Any]
_MOST = 6  #: names in a sentence
#: Numbers of a compiled kernel, the most significant first.
_NUMBERS = ("spills", "registers", "tensor_core", "load_bytes", "loads", "shared_bytes")


def differences(old: Record, new: Record) -> list[str]:
    """One sentence for each difference between two records of CallCounts; [] if they are equal."""
    sentences = [
        *_launches(old, new),
        *_configurations(old, new),
        *_counted("waits", "wait for the device", old, new),
        *_counted("copies", "copy between host and device", old, new),
        *_allocations(old, new),
        *_counted("operators", "operator is dispatched", old, new),
        *_counted("functions", "Python function is called", old, new),
        *_compiled(old, new),
    ]
    return sentences or _other_metrics(old, new)


def _both(key: str, old: Record, new: Record) -> bool:
    return key in old and key in new


def _name(kernel: str) -> str:
    return kernel.partition("[")[0]


def _launches(old: Record, new: Record) -> list[str]:
    if not _both("kernels", old, new) or old["kernels"] == new["kernels"]:
        return []
    before, after = Counter(map(_name, old["kernels"])), Counter(map(_name, new["kernels"]))
    sentences = []
    for name in after | before:
        if not before[name]:
            sentences.append(f"{name} is launched, and was not before" + _times(after[name]))
        elif not after[name]:
            sentences.append(f"{name} is launched no longer" + _times(before[name]))
        elif before[name] != after[name]:
            sentences.append(f"{name} is launched {after[name]} times, not {before[name]}")
    if sentences:
        return sentences
    if [_name(k) for k in old["kernels"]] != [_name(k) for k in new["kernels"]]:
        return [f"kernels are launched in another order: {', '.join(new['kernels'])}"]
    changed = dict.fromkeys((a, b) for a, b in zip(old["kernels"], new["kernels"]) if a != b)
    return [f"{_name(a)}: grid [{a.partition('[')[2]} -> [{b.partition('[')[2]}" for a, b in changed]


def _times(count: int, word: str = "times") -> str:
    return f" ({count} {word})" if count > 1 else ""


def _configurations(old: Record, new: Record) -> list[str]:
    """Changes of what launches are specialised for, of kernels with as many launches as before."""
    if not _both("launches", old, new):
        return []
    sentences: dict[str, None] = {}
    before, after = _by_kernel(old["launches"]), _by_kernel(new["launches"])
    for name in before:
        if len(before[name]) != len(after.get(name, [])):
            continue
        for a, b in zip(before[name], after[name]):
            changes = [
                f"{key} {a.get(key, 'nothing')} -> {b.get(key, 'nothing')}"
                for key in dict.fromkeys((*a, *b))
                if a.get(key) != b.get(key)
            ]
            if changes:
                sentences[f"{name}: {', '.join(changes)}"] = None
    return list(sentences)


def _by_kernel(launches: Iterable[Record]) -> dict[str, list[dict[str, str]]]:
    by_kernel: dict[str, list[dict[str, str]]] = {}
    for launch in launches:
        by_kernel.setdefault(kernel_name(launch), []).append(settings(launch))
    return by_kernel


def _counted(key: str, what: str, old: Record, new: Record) -> list[str]:
    """A sentence about two dictionaries from names to counts. `what`: their key in _PLURALS."""
    if not _both(key, old, new) or old[key] == new[key]:
        return []
    changes = {n: new[key].get(n, 0) - old[key].get(n, 0) for n in (*new[key], *old[key])}
    changes = {n: c for n, c in changes.items() if c}
    return [f"{_more(sum(changes.values()), what)}: {_names(changes)}"]


_PLURALS = {
    "wait for the device": "waits for the device",
    "copy between host and device": "copies between host and device",
    "operator is dispatched": "operators are dispatched",
    "Python function is called": "Python functions are called",
    "tensor is allocated": "tensors are allocated",
}


def _more(change: int, what: str) -> str:
    if change == 0:
        return f"other {_PLURALS[what]}"
    noun = what if abs(change) == 1 else _PLURALS[what]
    return f"{abs(change)} {'more' if change > 0 else 'fewer'} {noun}"


def _names(changes: Mapping[str, int]) -> str:
    largest = sorted(changes, key=lambda n: -abs(changes[n]))
    names = [f"{n} ({changes[n]:+d})" for n in largest[:_MOST]]
    if len(largest) > _MOST:
        names.append(f"and {len(largest) - _MOST} others")
    return ", ".join(names)


def _allocations(old: Record, new: Record) -> list[str]:
    if not _both("allocations", old, new):
        return []
    before: Counter[str] = Counter(old["allocations"])
    after: Counter[str] = Counter(new["allocations"])
    if before == after:
        return []
    changes = {n: after[n] - before[n] for n in after | before if after[n] != before[n]}
    size = new["metrics"]["allocated_bytes"] - old["metrics"]["allocated_bytes"]
    return [f"{_more(sum(changes.values()), 'tensor is allocated')} ({size:+d} bytes): {_names(changes)}"]


def _compiled(old: Record, new: Record) -> list[str]:
    """Changes of machine code: one sentence for all kernels with the same change, one for all sizes of code."""
    if not _both("compiled", old, new):
        return []
    kernels_by_change: dict[str, list[str]] = {}
    sizes: list[int] = []
    for before, after in _pairs(old["compiled"], new["compiled"]):
        changes: dict[str, list[str]] = {}
        for target, numbers in old["compiled"][before].items():
            now = new["compiled"][after].get(target, numbers)
            for change in _machine_code(numbers, now):
                changes.setdefault(change, []).append(target)
            if "error" not in (*numbers, *now) and now["code_bytes"] != numbers["code_bytes"]:
                sizes.append(now["code_bytes"] - numbers["code_bytes"])
        if changes:
            change = "; ".join(f"{change} ({', '.join(targets)})" for change, targets in changes.items())
            kernels_by_change.setdefault(change, []).append(after.partition(" (")[0])
    sentences = [f"compiled, {_kernels(kernels)}: {change}" for change, kernels in kernels_by_change.items()]
    if sizes:
        count = f"{len(sizes)} kernels, counted for each target, have" if len(sizes) > 1 else "1 kernel has"
        sentences.append(f"compiled, {count} code of another size: {min(sizes):+d} to {max(sizes):+d} bytes")
    return sentences


def _kernels(configurations: list[str]) -> str:
    if len(configurations) == 1:
        return configurations[0]
    names = Counter(text.partition(" ")[0] for text in configurations)
    return ", ".join(name + _times(n, "configurations") for name, n in names.items())


def _pairs(old: Iterable[str], new: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of configurations: equal ones, and those of a kernel that changed, in their order, if they are as many."""
    pairs = [(text, text) for text in old if text in set(new)]
    before, after = [t for t in old if t not in set(new)], [t for t in new if t not in set(old)]
    for name in dict.fromkeys(text.partition(" ")[0] for text in before):
        changed = [[t for t in texts if t.partition(" ")[0] == name] for texts in (before, after)]
        if len(changed[0]) == len(changed[1]):
            pairs += zip(*changed)
    return pairs


def _machine_code(old: Record, new: Record) -> list[str]:
    if old == new:
        return []
    if "error" in new:
        return [f"does not compile{' any more' if 'error' not in old else ', for another reason'}: {new['error']}"]
    if "error" in old:
        return ["compiles again"]
    return [
        f"{key} {_numbers(old[key])} -> {_numbers(new[key])}" for key in _NUMBERS if key in old and old[key] != new[key]
    ]


def _numbers(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}:{v}" for k, v in value.items()) or "none"
    return str(value)


def _other_metrics(old: Record, new: Record) -> list[str]:
    """The metrics that differ."""
    before, after = old.get("metrics", {}), new.get("metrics", {})
    return [f"{METRICS[n].counts}: {before[n]} -> {after[n]}" for n in before if n in after and before[n] != after[n]]
