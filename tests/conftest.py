"""Settings shared by all tests: one thread per process, nothing from outside, steady examples."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Set before any library reads them. The suite shares few cores with the servers that it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Servers keep hashes of weights there.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="planetserve-tests-")

import hypothesis

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# Slow machines must not fail a property for being slow, and a run must be repeatable.
hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=60, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")
