"""The page in a browser: what it shows, by keyboard alone, in both schemes, whatever is in the records."""

import json
import random

import pytest

from harness import cli
from harness.report import data, page
from harness.results import merge
from tests.report.test_report import HOST, verdict
from tests.support.chromium import Browser

NASTY = '</script><img src=x onerror="window.hit=1"><script>window.hit=2</script>&amp;"\'\u2028'
SHAPE = "h128-i64-e4-k2-bf16"
MAP = {
    "tokens": 8, "columns": 6, "token_step": 2, "column_step": 1, "map": ["000000", "000000", "012345", "900008"],
    "unit": "sigma", "steps": [2**n for n in range(2, 10)],
    "experts": [[3, 5, 2, 7, 12.5], [0, 3, 0, 0, 0.9]], "experts_left_out": 0,
}  # fmt: skip
GPU = {"device": "cuda", "environment": HOST | {"device_name": "NVIDIA H200"}}


def records():
    """Two places: a CPU with something red, a GPU with times over twelve runs."""
    for n in range(230):
        yield verdict(f"t{n + 1}-{SHAPE}-random", budget=n / 240, budgets={"rms": n / 240}, statistic="rms", calls=1)
    text = {"report": f"line one\n{NASTY}", "error_map": MAP, "budget": 12.5, "budgets": {"rms": 12.5}, "calls": 1}
    yield verdict(f"t7-{SHAPE}-kn-exact", "failed", family="scratch", reason=f"wrong {NASTY}", statistic="rms", **text)
    yield verdict(f"t8-{SHAPE}-exact", "crashed", backend=f"mine{NASTY}", reason="ValueError: no")
    yield verdict(f"t9-{SHAPE}-exact", "mistrusted", reason="only 3% of it", calls=1)
    yield verdict(f"t9-{SHAPE}-exact", "unsupported", backend="other", reason="quant: bf16 only")
    for day in range(12):
        for t, us in ((1, 50.0), (64, 80.0 if day < 6 else 96.0)):
            rates = {"bytes_per_s": 4e12 * us / 100, "flops_per_s": 1e13 * t}
            ceilings = {"copy_bytes_per_s": 4e12, "flops_per_s": {"bf16": 7e14}}
            perf = {"device_us": us + 0.01 * day, "bytes": 10**8, "flops": 10**9 * t, "operand": "bf16"}
            perf |= rates | {"floor_us": 25.0, "ceilings": ceilings}
            judged = {"calls": 1, "statistic": "rms", "budget": 0.8, "day": day + 1, "commit": f"c{day}"}
            yield verdict(f"t{t}-{SHAPE}-random", family="perf", perf=perf, **judged) | GPU


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "r.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records()) + '{"schema": 2, "ru')
    out = path.with_name("report.html")
    assert cli.main(["report", str(path), "--out", str(out), "--title", f"Kernels {NASTY}"]) == 1  # of schema 2
    return out


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture
def opened(browser, report):
    browser.open(report)
    return browser


FOCUS = "document.activeElement"


def text(browser, selector):
    return browser.ask(f"document.querySelector({json.dumps(selector)})?.innerText")


def click(browser, selector):
    browser.ask(f"document.querySelector({json.dumps(selector)}).click()")


def test_five_seconds_are_enough_for_the_headline(opened):
    assert text(opened, ".verdict") == "\u2715 2 red of 235 verdicts at 2 places"
    places = opened.ask("[...document.querySelectorAll('#summary tbody tr')].map(r => r.innerText.split('\\t'))")
    assert [(p[0], p[1], p[4], p[5:]) for p in places] == [
        ("NVIDIA H200", "cuda", "c11", ["2", "0", "0", "0"]),
        ("x86_64", "cpu", "abc", ["233", "2", "1", "1"]),
    ]
    assert "1 line cut off by a crash" in text(opened, "#remarks")
    assert opened.complaints() == []


def test_the_matrix_says_in_words_what_its_colours_say(opened):
    names = opened.ask("[...document.querySelectorAll('#matrix button.cell')].map(b => b.ariaLabel)")
    assert "triton, layers: 230 passed, mistrusted 1; worst budget 0.95" in names
    assert "triton, scratch: \u2715 1 red; worst budget 12.50" in names
    assert "other, all families: not run, 1 unsupported" in names and len(names) == 9
    cells = opened.ask("[...document.querySelectorAll('#matrix td')].map(c => c.innerText.trim())")
    assert all(cells) and len(cells) == 16 and cells.count("no record") == 7


def test_from_the_matrix_to_a_case_and_back_by_keyboard_alone(opened):
    opened.press("Tab")
    assert opened.ask(f"{FOCUS}.className") == "skip"
    opened.press("Enter", "Tab")
    assert opened.ask(f"{FOCUS}.ariaLabel").startswith("triton, all families: 2 passed")
    opened.press("ArrowDown", "ArrowDown", "ArrowDown", "End")
    assert opened.ask(f"{FOCUS}.ariaLabel").startswith("triton, scratch: \u2715 1 red")
    opened.press("Enter")
    assert text(opened, "#count") == "1 case of 236"
    case = f"t7-{SHAPE}-kn-exact"
    assert opened.ask(f"{FOCUS}.innerText") == case
    opened.press("Enter")
    assert opened.ask("document.getElementById('detail').open && location.hash.startsWith('#case/t7-')")
    assert text(opened, "#reproduce") == f"python3 -m harness run {case} --backend triton --device cpu"
    opened.press("Tab", "Tab")
    assert opened.ask(f"{FOCUS}.innerText") == "Copy"
    opened.press("Escape")
    assert not opened.ask("document.getElementById('detail').open")
    assert opened.ask(f"{FOCUS}.innerText") == case
    assert opened.complaints() == []


def test_tab_goes_through_the_whole_page_and_out(opened):
    seen, before = [], None
    for _ in range(120):
        opened.press("Tab")
        here = opened.ask(f"{FOCUS}.closest('section')?.id ?? ({FOCUS} === document.body ? 'out' : 'top')")
        which = opened.ask(f"[...document.querySelectorAll('*')].indexOf({FOCUS})")
        assert which != before, f"stuck in {here}"
        before = which
        if here not in seen:
            seen.append(here)
        if here == "out":
            break
    assert seen[:4] == ["top", "summary", "matrix", "reasons"] and seen[-1] == "out"
    assert {"not-run", "cases", "budgets", "roofline", "trends"} <= set(seen)


def test_a_case_tells_everything_that_its_record_holds(opened):
    click(opened, "[data-row]")  # red ones come first
    shown = text(opened, "#detail")
    opened.ask("document.querySelectorAll('#detail details').forEach(d => { d.open = true })")
    shown = text(opened, "#detail")
    for words in (
        "line one", NASTY.replace("\u2028", "")[:40], "12.50", "rms", "8: 512", "tokens", "hidden size\n128", "kn: w13",
        "5\t2\t7\t12.5", "012345",
    ):  # fmt: skip
        assert words in shown, words
    marked = opened.ask("document.querySelectorAll('#detail svg rect[class^=m]').length")
    assert marked == 7 + 8  # cells that are off, and the legend's eight digits
    assert opened.complaints() == []


def test_an_address_opens_its_case(browser, report):
    browser.open(report)
    click(browser, "[data-row]")
    address = browser.ask("location.hash")
    browser.open(report, address)
    assert browser.ask("document.getElementById('detail').open")
    assert text(browser, "#detail-title") in address


def test_cases_are_filtered_sorted_and_turned(opened):
    assert text(opened, "#count") == "236 cases, 1 to 100 shown"
    assert opened.ask("document.querySelectorAll('#cases tbody tr').length") == 100
    opened.ask("[...document.querySelectorAll('#cases .pager button')].find(b => b.innerText === 'Last').click()")
    assert opened.ask("document.querySelectorAll('#cases tbody tr').length") == 36
    click(opened, "[data-status=crashed]")
    assert text(opened, "#count") == "1 case of 236"
    click(opened, "[data-status=passed]")
    assert text(opened, "#count") == "233 cases of 236, 1 to 100 shown"
    click(opened, "[data-sort=budget]")
    click(opened, "[data-sort=budget]")
    assert text(opened, "#cases tbody tr").split("\t")[:2] == ["passed", f"t230-{SHAPE}-random"]
    assert opened.ask("document.querySelector('th[aria-sort=descending]').innerText").startswith("Budget")
    opened.ask("document.getElementById('filter-text').focus()")
    opened.send("Input.insertText", text="T64- random")
    opened.wait("document.getElementById('count').textContent.startsWith('2 cases')")


def test_time_is_drawn_and_its_shifts_are_marked(opened):
    points = opened.ask("[...document.querySelectorAll('#roofline .point')].map(p => p.getAttribute('aria-label'))")
    assert len(points) == 2 and "26.0 % of the roof" in points[1]
    trends = text(opened, "#trends")
    assert "1 series with a shift" in trends and "+20.1 % from c6" in trends and "13 runs" in trends
    opened.ask("document.querySelector('#roofline .point').focus()")
    assert text(opened, "#tip").startswith(f"t1-{SHAPE}-random")
    opened.press("ArrowRight", "Enter")
    assert text(opened, "#detail-title") == f"t64-{SHAPE}-random"
    assert "Device time over 12 runs" in text(opened, "#detail")


def test_nothing_in_the_records_becomes_markup(opened, report):
    click(opened, "[data-row]")
    assert opened.ask("window.hit") is None and opened.ask("document.images.length") == 0
    assert opened.ask("document.title").startswith("Kernels </script><img")
    assert opened.ask("document.scripts.length") == 2  # the data and the script
    source = report.read_text()
    assert 'onerror="window' not in source and source.count("</script>") == 2
    assert opened.complaints() == []


CONTRAST = r"""(() => {
  document.querySelectorAll('details').forEach((d) => { d.open = true; });
  const parts = (c) => c.match(/[\d.]+/g).map(Number);
  // Relative luminance and contrast as in WCAG 2.2; 4.5 is the threshold of its success criterion 1.4.3.
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, k, n) => sum + k * linear(parts(c)[n] / 255), 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const c = getComputedStyle(at).backgroundColor, p = parts(c);
      if (p.length === 3 || p[3] === 1) return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement, hidden = node.closest('script, noscript, title');
    if (hidden || !walk.currentNode.data.trim() || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), back = behind(node);
    const front = node.ownerSVGElement ? style.fill : style.color;
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    found[`${front} on ${back}`] = [(a + 0.05) / (b + 0.05), walk.currentNode.data.trim().slice(0, 30)];
  }
  return found;
})()"""


@pytest.mark.parametrize("scheme", ("light", "dark"))
@pytest.mark.parametrize("width", (1400, 400))
def test_every_text_can_be_read(browser, report, scheme, width):
    browser.open(report, width=width, scheme=scheme)
    page_pairs = browser.ask(CONTRAST)
    click(browser, "[data-row]")
    pairs = page_pairs | browser.ask(CONTRAST)
    assert len(pairs) >= 10
    assert {pair: text for pair, text in pairs.items() if text[0] < 4.5} == {}
    dark = browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    # Nothing but a table's own frame scrolls sideways.
    assert browser.ask("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.complaints() == []


def test_the_chosen_scheme_is_remembered(browser, report):
    browser.open(report, scheme="light")
    browser.ask("document.getElementById('scheme').focus()")
    browser.press("Enter", "Space")
    assert text(browser, "#scheme") == "Scheme: dark"
    browser.open(report, scheme="light")
    assert text(browser, "#scheme") == "Scheme: dark"
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    browser.press("Tab")
    click(browser, "#scheme")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_on_paper(opened):
    opened.send("Emulation.setEmulatedMedia", media="print")
    assert opened.ask("getComputedStyle(document.getElementById('nav')).display") == "none"
    assert opened.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.send("Page.printToPDF", printBackground=True)["data"].startswith("JVBERi")  # %PDF


def test_a_page_without_times_says_how_to_get_some(browser, tmp_path):
    found = data.payload([verdict(f"t1-{SHAPE}-exact")], [], "One", "now")
    (tmp_path / "one.html").write_text(page.render(found, []))
    browser.open(tmp_path / "one.html")
    assert text(browser, ".verdict") == "\u2713 None red of 1 verdict at 1 place"
    assert 'pytest cases -m "cuda and perf" --results=' in text(browser, "#roofline")
    assert "Nothing is red" in text(browser, "#reasons") and browser.complaints() == []


def test_a_hundred_thousand_records(browser, tmp_path):
    """Of ten machines: a page under 10 MB, and it opens."""
    draw = random.Random(0)
    with (tmp_path / "r.jsonl").open("w") as file:
        for n in range(100_000):
            used = {name: draw.random() for name in ("rho", "rms", "median")}
            case = f"t{n % 97 + 1}-h{64 * (n % 31 + 1)}-i64-e{n % 13 + 2}-k2-bf16-random-s{n // 10 % 1000}"
            more = {"budget": max(used.values()), "budgets": used, "statistic": "rms", "calls": 1, "plan": "act=io"}
            if n % 50 == 0:
                rows = ["".join(draw.choices("0123456789", k=64)) for _ in range(32)]
                more |= {"status": "failed", "report": f"{n} is wrong\n" * 40, "error_map": MAP | {"map": rows}}
            if n % 5 == 1:
                us = draw.uniform(10, 1000)
                more["perf"] = {"device_us": us, "bytes": 10**8, "flops": n * 10**6, "bytes_per_s": 1e14 / us}
            seconds = draw.random()
            record = verdict(case, row=f"machine-{n % 10}", family=f"family-{n % 8}", seconds=seconds, **more)
            file.write(json.dumps(record) + "\n")
    merged = merge.merge([tmp_path])
    found = page.render(data.payload(merged.records, merged.remarks, "Many", "now", merged.problems), [])
    assert len(merged.records) == 100_000
    assert len(found) < 10e6, len(found)
    (tmp_path / "many.html").write_text(found)
    browser.open(tmp_path / "many.html")
    assert text(browser, ".verdict") == "\u2715 2,000 red of 100,000 verdicts at 10 places"
    assert text(browser, "#count") == "100,000 cases, 1 to 100 shown"
    click(browser, "[data-sort=budget]")
    click(browser, "[data-row]")
    assert browser.ask("document.getElementById('detail').open") and browser.complaints() == []
