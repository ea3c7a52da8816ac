"""Command lines and files that are wrong. Every one must end with one line that says so, soon, and never green."""

from collections.abc import Iterator
from dataclasses import dataclass, field

GOOD = "t16-h256-i128-e8-k2-bf16"
LONG = "9" * 400
TABLES = b"a.b.c = 1\n"


@dataclass(frozen=True)
class HostileInput:
    """The words of a `moe-harness` command; "{dir}" stands for a new directory with the files in it."""

    name: str
    argv: list[str]
    files: dict[str, bytes] = field(default_factory=dict)


def hostile_toml() -> Iterator[tuple[str, bytes]]:
    """(name, content) of files that are no TOML, or whose values have no meaning for any reader of this project."""
    yield "empty", b""
    yield "comment", b"# nothing\n"
    yield "blank", b"\n" * 100_000
    yield "not UTF-8", b"\xff\xfe\x00a = 1"
    yield "UTF-16", "a = 1\n".encode("utf-16")
    yield "NUL bytes", b"a = 1\x00\n\x00" * 20
    yield "no TOML", b"<html>\n"
    yield "JSON", b'{"a": 1}\n'
    yield "twice", b"[a]\nb = 1\n[a]\nb = 2\n"
    yield "5,000 lists", b"a = " + b"[" * 5000 + b"]" * 5000
    yield "5,000 tables", b"a = " + b"{b = " * 5000 + b"1" + b"}" * 5000
    yield "5,000 dots", b"a" + b".a" * 5000 + b" = 1"
    yield "5,000 dots of a section", b"[a" + b".a" * 5000 + b"]"
    yield "250 dots", b"[a" + b".a" * 250 + b"]\nb" + b".a" * 250 + b" = 1"
    yield "5,000 sections", b"".join(b"[a%d]\n" % n for n in range(5000))
    yield "100,000 keys", b"".join(b"a%d = 1\n" % n for n in range(100_000))
    yield "an integer of 400 digits", b"a = " + LONG.encode()
    yield "an integer of 5,000 digits", b"a = " + b"9" * 5000
    yield "an integer of 100,000 hexadecimal digits", b"a = 0x" + b"f" * 100_000
    yield "a text of 3 MB", b'a = "' + b"x" * 3_000_000 + b'"'
    yield "a text of 10 MB", b'a = "' + b"x" * 10_000_000 + b'"'
    yield "a key of 1 MB", b"a" * 1_000_000 + b" = 1"
    yield "the year 9999", b"a = 9999-12-31T23:59:59+23:59"
    yield "the year 0000", b"a = 0000-00-00"
    yield "no date", b"a = 2026-02-31"
    yield "nan", b"a = nan"
    yield "escape sequences", b'"\\u001b[31m" = "\\u202e::error::"'
    yield "commands of CI", b'"::error::x" = "##[error]x"'
    yield "a surrogate", b'a = "\\ud800"'
    yield "empty keys", b'"" = {"" = ""}'
    for value in (b"1", b"-1", b"true", b"1e308", b'"x"', b"[]", b"[[1]]", b"{}", b"1979-05-27", b"07:32:00"):
        for key in (b"known", b"versions", b"compiled", b"mean", b"slow", b"cpu", b"a"):
            yield f"{key.decode()} = {value.decode()}", key + b" = " + value


WORDS = (
    "",
    " ",
    "-1",
    "nan",
    "inf",
    "1e999",
    LONG,
    "x" * 1_000_000,
    "１６",
    "1_0",
    "0x10",
    "a\0b",
    "\x1b[31m",
    "1;ls",
    "true",
)
#: Words of which a number would be wrong too, by command and option.
NUMBERS = {
    ("run", GOOD, "--backend", "torch-grouped-mm"): ("--seeds", "--case-timeout"),
    ("fuzz", "--backend", "torch-grouped-mm"): ("--seconds", "--examples", "--bytes", "--seed", "--case-timeout"),
    ("compare", "HEAD", "HEAD"): ("--budget", "--threshold"),
    ("bisect", GOOD, "--good", "HEAD", "--bad", "HEAD", "--backend", "triton"): ("--confidence", "--budget"),
    ("mutate",): ("--jobs", "--floor", "--control-runs", "--limit", "--case-limit"),
    ("verify",): ("--jobs",),
}
FILES = {
    ("compare", "HEAD", "HEAD"): ("--markdown", "--json"),
    ("mutate", "align-*"): ("--results",),
    ("mutate", "align-*", "--against", "all"): ("--markdown",),
    ("matrix", "cpu"): ("--results",),
    ("summary", "{dir}"): ("--markdown",),
    ("report", "{dir}"): ("--out",),
    ("bisect", GOOD, "--good", "HEAD", "--bad", "HEAD", "--backend", "triton"): ("--log",),
}
DESCRIPTORS = (
    "", "-", "--", " ", "t16", GOOD + "-", GOOD + "-bf17", GOOD + "-t16", GOOD + "-swap.copi_", GOOD + "-align.b17",
    GOOD + "-sequence.calls.7", GOOD + "-nix.nix", GOOD + "-SWAP.COPY_", GOOD + "-e4m3.block.grp", GOOD + "-e9m9.x.y",
    GOOD + "-limit0", GOOD + "-limit" + LONG[:300], GOOD + "-limit1.23456789", GOOD + "-ep0.0", GOOD + "-ep3.0",
    GOOD + "-ep4.9", GOOD + "-ep" + LONG[:200] + ".0", GOOD + "-s" + LONG[:200], GOOD + "-s999999999999999999999",
    GOOD + "-shared" + LONG[:200], GOOD + "-ids128", GOOD + "-win", GOOD + "-remote", GOOD + "-relu2-limit7",
    GOOD + "-\x1b[31m", GOOD + "-\0", GOOD + "-\u202e", GOOD + "\n::error::x", GOOD + "-\ud800", GOOD + "-../../x",
    GOOD + "-exact" * 100_000, "t" * 1_000_000, "-" * 1_000_000, "t" + LONG + "-h64-i64-e8-k2-bf16",
    "t999999999999-h64-i64-e8-k2-bf16", "t-1-h64-i64-e8-k2-bf16", "t１６-h64-i64-e8-k2-bf16", "t16-h0-i64-e8-k2-bf16",
    "t16-h64-i0-e8-k2-bf16", "t16-h64-i64-e0-k0-bf16", "t16-h64-i64-e2-k3-bf16", "t16-h64-i64-e8-k0-bf16",
    "t16-h99999999999-i64-e8-k2-bf16", "t16-h64-i64-e99999999999-k2-bf16", "t1.5-h64-i64-e8-k2-bf16",
    "t16-h64-i64-e8-k2-fp64", "t16-h64-i64-e8-k2-fp32-e4m3.block.group", "t0x10-h64-i64-e8-k2-bf16",
    '{"tokens": 16}', "$(touch x)-h64", "%s%s%n", "*", "[[:alpha:]]*", "t16,h64,i64,e8,k2,bf16",
)  # fmt: skip
BACKENDS = (
    "", ":", "a:", ":b", "x:y:z", "nobody", "trition", "no_such_module:Thing", "os:getcwd", "json:loads", "../x:Y",
    "a" * 1_000_000, "a\0b:C", "\x1b[31m", "os.path", "builtins:int", "sys:exit", "..:x", "tests.support:x", "é:è",
)  # fmt: skip


def hostile_inputs() -> Iterator[HostileInput]:
    """Hostile words of every command, and hostile files of those that read one, results files left out."""
    for descriptor in DESCRIPTORS:
        name = descriptor if len(descriptor) < 100 else f"{descriptor[:60]}... ({len(descriptor)} characters)"
        yield HostileInput(f"descriptor {name!r}", ["run", descriptor, "--backend", "torch-grouped-mm"])
    for spec in BACKENDS:
        yield HostileInput(f"--backend {spec[:40]!r}", ["run", GOOD, "--backend", spec])
    for words, options in NUMBERS.items():
        for option in options:
            for word in WORDS:
                yield HostileInput(f"{words[0]} {option} {word[:40]!r}", [*words, f"{option}={word}"])
    for words, options in FILES.items():
        for option in options:
            for path in ("{dir}", "/dev/null/x", "{dir}/file/x", "a\0b", "x" * 10_000, ""):
                argv = [*words, f"{option}={path}"]
                yield HostileInput(f"{words[0]} {option} {path[:40]!r}", argv, {"file": b""})
    for name, content in hostile_toml():
        yield HostileInput(f"baseline: {name}", ["structure", "--baseline", "{dir}/x.toml"], {"x.toml": content})
    for path in ("{dir}", "/dev/zero", "/dev/null", "{dir}/none", "a\0b", "x" * 10_000, ""):
        yield HostileInput(f"baseline {path[:40]!r}", ["structure", f"--baseline={path}"])
    yield from _other_words()


def _other_words() -> Iterator[HostileInput]:
    for words in (
        [], ["rnu"], ["run"], ["x" * 1_000_000], ["run", GOOD], ["run", GOOD, "--backend"], ["list", "--device", "tpu"],
        ["list", "--family", "layerz"], ["list", "--family", "x" * 1_000_000], ["list", "--nix"], ["doctor", "extra"],
        ["matrix", "cpuu"], ["matrix", "x" * 1_000_000], ["matrix", "a\0b"], ["matrix", "cpu", "--when", "never"],
        ["matrix", "--install"], ["matrix", "cpu", "--compare", "HEAD"], ["matrix", "cpu", "--shard", "1/100000000"],
        ["matrix", "cpu", "--shard", f"1/{LONG}"], ["matrix", "cpu", "--shard", "0/0"],
        ["matrix", "cpu", "--shard", "-1/2"], ["matrix", "cpu", "--shard", "１/2"], ["mutate", "nix-nix"],
        ["mutate", "x" * 1_000_000], ["mutate", "[" * 1000], ["mutate", "--against", "strictt"],
        ["mutate", "--markdown", "{dir}/x"], ["mutate", "--device", "tpu"], ["compare", "nix", "HEAD"],
        ["compare", "HEAD"], ["compare", "HEAD", "HEAD", "--repo", "/"], ["compare", "HEAD", "HEAD", "--metric", "nix"],
        ["compare", "HEAD", "HEAD", "--repo", "{dir}", "--backend", "a:b"], ["compare", "HEAD", "HEAD", GOOD + "-nix"],
        ["compare", "--repo=a\0b", "--backend=a:b", "HEAD", "HEAD"], ["compare", "a\0b", "HEAD"],
        ["compare", "--", "--upload-pack=x", "HEAD"], ["compare", "x" * 1_000_000, "HEAD"], ["structure", GOOD],
        ["structure", "t16-h1", "--backend", "triton"], ["structure", "--accept", GOOD, "--backend", "triton"],
        ["structure", GOOD, "--backend", "triton", "--target", "sm_99999999"],
        ["structure", GOOD, "--backend", "triton", "--target", f"sm_{LONG}"], ["structure", "--target", "sm_90"],
        ["capabilities", "--backend", "nobody"], ["capabilities", "--corner", "nix"], ["capabilities", "--device", "x"],
        ["bisect", GOOD, "--good", "nix", "--bad", "HEAD", "--backend", "triton"],
        ["bisect", GOOD, "--good", "HEAD", "--bad", "HEAD", "--backend", "triton", "--target", "sm_９０"],
        ["bisect", GOOD, "--good", "HEAD", "--bad", "HEAD", "--backend", "triton", "--repo", "{dir}"],
        ["bisect", GOOD, "--good", "HEAD", "--bad", "HEAD", "--backend", "triton", "--metric", "lanches"],
        ["summary", "--plan", "[" * 5000], ["summary", "--plan", "7"], ["summary", "--plan", "{}"],
        ["summary", "/dev/zero"], ["floor", "/dev/zero"], ["floor", "{dir}"], ["floor", "a\0b"],
        ["report", "/dev/zero"],
        ["matrix", "--durations", "/dev/zero"], ["matrix", "--durations", "{dir}/none"],
        ["fuzz"], ["fuzz", "--backend", "nobody"], ["verify", "--device", "tpu"], ["verify", "--backend"],
    ):  # fmt: skip
        yield HostileInput(" ".join(word[:60] for word in words) or "no word", words)
