"""Package metadata. Tool settings are in pyproject.toml, tested versions in constraints.txt."""

import re
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
INIT = (ROOT / "src" / "planetserve" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)
if VERSION is None:
    raise SystemExit("src/planetserve/__init__.py does not define __version__")

setup(
    name="planetserve",
    version=VERSION.group(1),
    description="Run one large language model on many machines, as if it were local",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"planetserve": ["py.typed", "demo_model/*", "gateway/web/*"]},
    # Loaded with ctypes. Without a C compiler the installation goes on without it.
    ext_modules=[
        Extension(
            "planetserve.native._kernels",
            ["src/planetserve/native/kernels.c"],
            depends=sorted(glob("src/planetserve/native/*.inc")),
            extra_compile_args=["-O3"],
            libraries=["m"],
            optional=True,
        )
    ],
    install_requires=[
        "torch>=2.6",
        "transformers>=5.16,<6",
        "hivemind>=1.1.12,<2",
        "blake3>=1,<2",  # hivemind's dependencies bring it too
        "cryptography>=47",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",  # chat templates of tokenizers
        "numpy>=1.26",
        "packaging>=23",  # what versions the installed packages need
        "psutil>=5.9",  # free memory
        "pydantic>=2.7,<3",
        "PyYAML>=6.0",
        "rich>=13.7",
        "typing_extensions>=4.6",  # `override`, which Python has from 3.12
    ],
    extras_require={
        "gateway": [
            "fastapi>=0.139",
            "llguidance>=1.5,<2",
            "prometheus-client>=0.21",
            "uvicorn>=0.34",
        ],
        "metrics": ["prometheus-client>=0.21"],
        "nsga2": ["pymoo>=0.6.1"],
        "plot": ["matplotlib>=3.8"],
        "simulation": ["simpy>=4.1"],
        "quant": ["bitsandbytes>=0.46", "accelerate>=1.1"],
        "dev": [
            "anthropic>=1",  # as openai
            "hypothesis>=6.100",
            "mypy>=1.15",
            "axe-playwright-python>=0.1.7",  # finds what keeps people from using the web page
            "openai>=2",  # the client that tests of the gateway use
            "playwright>=1.50",  # drives the web page in Chromium
            "pytest>=8.2",
            "pytest-asyncio>=1.0",
            "pytest-timeout>=2.3",
            "ruff>=0.11",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["planetserve = planetserve.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
)
