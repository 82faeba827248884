"""Chromium for tests of the web page."""

from __future__ import annotations

import importlib.util
import os
import shutil

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
"""Where it is; None: nowhere."""

FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
]

MUST_RUN = bool(os.environ.get("PLANETSERVE_NEEDS_BROWSER"))
"""Continuous integration sets it: there the tests fail without a browser."""

LACKS = [
    *([] if CHROMIUM else ["Chromium (apt-get install chromium)"]),
    *(
        f"{name} (make venv)"
        for name in ("playwright", "axe_playwright_python")
        if importlib.util.find_spec(name) is None
    ),
]
"""What a run of the tests would need."""
