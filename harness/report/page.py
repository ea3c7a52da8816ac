"""The page: one HTML file with its style, its script and its data, without any request.

The data is JSON, deflated, in base64; the browser unpacks it (DecompressionStream: Chromium 80, Firefox 113, Safari
16.4). It cannot become markup: base64 has no "<", and the script sets text, never HTML. A content security policy
allows this script and this style, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import zlib
from pathlib import Path
from string import Template
from typing import Any

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("base.js", "charts.js", "detail.js", "cases.js", "overview.js", "time.js", "main.js")


def render(payload: dict[str, Any], plain: list[str]) -> str:
    """The text of the file. plain: lines that replace the page if scripts are switched off."""
    script = "\n".join(["'use strict';", *((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)])
    style = (ASSETS / "page.css").read_text(encoding="utf-8")
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    return Template((ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(payload["title"]),
        made=html.escape(payload["made"]),
        plain=html.escape("\n".join(plain)),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=base64.b64encode(zlib.compress(text.encode(), 6)).decode(),
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
