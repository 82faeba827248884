"""Build PlanetServe's demo language model from the text that ships with Python itself.

One script does the whole job: it reads the English in the running interpreter's standard library
(the `help()` topics, docstrings of Python and C code, comments, a few text files), cleans it,
trains a byte-level BPE tokenizer and a small Llama model on the CPU, measures perplexity on
held-out documents, and writes a folder that transformers' `AutoTokenizer` and
`AutoModelForCausalLM` load, with a model card that states the numbers of that very run.

Nothing is downloaded. Run it with CPython 3.11, the version whose text the shipped model knows.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import math
import os
import platform
import random
import re
import sys
import sysconfig
import tempfile
import textwrap
import time
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
DEFAULT_OUT = REPO / "src" / "planetserve" / "demo_model"

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, SYSTEM, USER, ASSISTANT]
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role: ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

# What people ask about. After a first look at everything, training dwells on these modules.
CORE_MODULES = set(
    "abc argparse array asyncio bisect builtins calendar cmath collections concurrent configparser "
    "contextlib copy csv dataclasses datetime decimal enum fractions functools gc glob hashlib "
    "heapq http importlib inspect io itertools json logging math multiprocessing operator os "
    "pathlib pickle queue random re select shutil signal socket statistics string struct "
    "subprocess sys tempfile textwrap threading time types typing unittest urllib warnings "
    "weakref zipfile zlib".split()
)
HELD_OUT_PER_MILLE = 20
MAX_PARAMETERS = 5_000_000
MAX_FILE_BYTES = 10_000_000


# ------------------------------------------------------------------------------------------------
# Cleaning: from reStructuredText-ish plain text to paragraphs
# ------------------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\u2192": "->",
        "\u2022": "*",
        "\t": "    ",
        "\x0c": "",
    }
)
_BULLET = re.compile(r"^\s*(?:[*+o-]|\(?\d{1,2}[.)])\s+\S")
_RULE = re.compile(r"^\s*([-=~*^#_.\"'+])\1{2,}\s*$")
_TABLE = re.compile(r"^\s*(\+[-=+]{3,}|\|.*\||[=-]{3,}(\s+[=-]{3,})+)\s*$")
_DIRECTIVE = re.compile(r"^\s*\.\. ?(\w[\w-]*::|_|\[).*$|^\s*\.\.\s*$")
_NOISE = re.compile(
    r"copyright|\$id|\$revision|\(c\)|pylint|noqa|flake8|@author|licensed? under", re.IGNORECASE
)


def tidy_inline(text: str) -> str:
    """Return `text` with inline markup removed: roles, double backticks, *emphasis*, footnotes."""
    text = text.translate(_PUNCTUATION)
    text = re.sub(r":(?:\w+:)?\w+:`~?\.?([^`]+)`", r"\1", text)
    text = re.sub(r"``([^`\n]+)``", r"\1", text)
    text = re.sub(r"`([^`'\n]+)[`']", r"\1", text)
    text = re.sub(r"(?<![\w*])\*\*([A-Za-z_][^*\n]{0,60}?)\*\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<![\w*\\])\*([A-Za-z_][^*\n]{0,60}?)\*(?![*])", r"\1", text)
    text = re.sub(r" \[(?:\d+|#\w*)\](?=[\s.,;:)]|$)", "", text)
    return text.replace("::\n", ":\n").removesuffix("::").replace("\\ ", "")


def _strip_blocks(lines: list[str]) -> list[str]:
    """Drop doctests with their output, tables, underlines, grammar and directives."""
    kept: list[str] = []
    in_doctest = False
    for line in lines:
        stripped = line.strip()
        if stripped.startswith((">>>", "In [")):
            in_doctest = True
        elif not stripped:
            in_doctest = False
        if in_doctest or _TABLE.match(line) or _DIRECTIVE.match(line) or "::=" in line:
            continue
        kept.append("" if _RULE.match(line) else line.rstrip())
    return kept


def _looks_like_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(text) > 0 and letters / len(text) > 0.86 and text.count(" ") >= 4


def _flow(block: list[str]) -> list[str]:
    """Unwrap one block of lines into paragraphs; code and short lines keep their line breaks."""
    pieces: list[list[str]] = [[]]
    for line in block:
        if _BULLET.match(line) and pieces[-1]:
            pieces.append([])
        pieces[-1].append(line)
    out: list[str] = []
    for piece in pieces:
        joined = re.sub(r"(?<=[.!?:;,]) {2,}", " ", " ".join(line.strip() for line in piece))
        wrapped = len(piece) > 1 and all(len(line.strip()) >= 42 for line in piece[:-1])
        if _BULLET.match(piece[0]) or len(piece) == 1 and _looks_like_prose(joined):
            out.append(joined)
        elif wrapped or _looks_like_prose(joined) and len(joined) > 60:
            out.append(joined)
        else:
            base = min(len(line) - len(line.lstrip()) for line in piece)
            indent = "    " if base else ""
            out.append("\n".join(indent + line[base:] for line in piece))
    return out


def clean(text: str) -> list[str]:
    """Split raw documentation text into clean paragraphs, one string each."""
    text = tidy_inline(inspect.cleandoc(text))
    paragraphs: list[str] = []
    block: list[str] = []
    for line in [*_strip_blocks(text.split("\n")), ""]:
        if line.strip():
            block.append(line)
        elif block:
            paragraphs += _flow(block)
            block = []
    return [p for p in paragraphs if _keep_paragraph(p)]


def _keep_paragraph(paragraph: str) -> bool:
    if not paragraph.isascii() or _NOISE.search(paragraph):
        return False
    visible = [c for c in paragraph if not c.isspace()]
    return bool(visible) and sum(c.isalpha() for c in visible) / len(visible) > 0.55


# ------------------------------------------------------------------------------------------------
# Corpus: units of text, each with the object it documents
# ------------------------------------------------------------------------------------------------


@dataclass
class Unit:
    """One piece of documentation: the smallest thing that is deduplicated or held out whole."""

    source: str  # topics, docstrings, builtins, comments or files
    group: str  # the topic, module or file; neighbours in a group are read together
    title: str  # the name of the documented object, or a heading
    kind: str  # function, method, class, module, section, comment or text
    paragraphs: list[str] = field(default_factory=list)
    signature: str = ""

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)

    @property
    def core(self) -> bool:
        """Say whether this is about the language or a public part of a much used module."""
        if self.source == "topics":
            return True
        known = self.group.split(".")[0] in CORE_MODULES and not is_private(self.title)
        return known and self.source in {"builtins", "docstrings"}

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(f"{self.title}\n{self.text}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def is_private(title: str) -> bool:
    """Say whether a dotted name has a private part; `__init__` and its like are public."""
    return any(re.match(r"_(?!_.*__$)", part) for part in title.split("."))


def topic_units() -> Iterator[Unit]:
    """Yield the sections of the language reference behind `help("for")` and its like."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    # Long topics first: short ones are mostly excerpts of them, and deduplication keeps the first.
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        heading, body = name, []
        lines = [*text.split("\n"), "", "***"]
        for index, line in enumerate(lines):
            if re.fullmatch(r"([*=\-~^])\1{2,}", line) and index and lines[index - 1].strip():
                if body[:-1]:
                    yield Unit("topics", name, heading, "section", clean("\n".join(body[:-1])))
                heading, body = tidy_inline(lines[index - 1]).replace('"', ""), []
            else:
                body.append(line)
        if body:
            yield Unit("topics", name, heading, "section", clean("\n".join(body)))


def stdlib_folder() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_sources() -> list[tuple[str, Path]]:
    """Return (module name, path) of the library's Python files, without tests and code tables."""
    skip = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data", "encodings"}
    # Applications, not library: much text about windows and grammar tables nobody asks about.
    skip |= {"idlelib", "lib2to3", "turtledemo"}
    root = stdlib_folder()
    found: list[tuple[str, Path]] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        generated = relative.parts[0].startswith(("config-", "_sysconfigdata"))
        if generated or skip & set(relative.parts):
            continue
        parts = list(relative.with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append((".".join(parts).replace("posixpath", "os.path"), path))
    # Public modules before private and foreign-platform twins, whose docstrings are copies.
    return sorted(found, key=lambda item: (item[0].startswith(("_", "nt")), item[0]))


def _python_signature(node: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> str:
    arguments = node.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    for starred in (arguments.vararg, arguments.kwarg):
        if starred:
            starred.annotation = None
    text = ast.unparse(arguments)
    if is_method:
        text = re.sub(r"^(self|cls)(, |$)", "", text)
    return f"({text})" if len(text) <= 120 else ""


def docstring_units() -> Iterator[Unit]:
    """Yield a unit for every docstring in the library's Python source, read without importing."""
    for module, path in stdlib_sources():
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        if doc := ast.get_docstring(tree):
            yield Unit("docstrings", module, module, "module", clean(doc))
        yield from _node_units(tree, module, module, False)


def _node_units(node: ast.AST, module: str, prefix: str, in_class: bool) -> Iterator[Unit]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            title = f"{prefix}.{child.name}"
            if doc := ast.get_docstring(child):
                yield Unit("docstrings", module, title, "class", clean(doc))
            yield from _node_units(child, module, title, True)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if doc := ast.get_docstring(child):
                kind = "method" if in_class else "function"
                signature = _python_signature(child, in_class)
                yield Unit(
                    "docstrings", module, f"{prefix}.{child.name}", kind, clean(doc), signature
                )
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _node_units(child, module, prefix, in_class)


def builtin_units() -> Iterator[Unit]:
    """Yield units for objects written in C, whose docstrings only introspection can reach."""
    # In a virtual environment "platstdlib" points into the environment, where there is nothing.
    dynload = stdlib_folder() / "lib-dynload"
    names = set(sys.builtin_module_names) | {p.name.split(".")[0] for p in dynload.glob("*.so")}
    names = {n for n in names if "test" not in n and not n.startswith("xx")}
    for name in ["builtins", *sorted(names - {"builtins"}, key=lambda n: n.lstrip("_"))]:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        public = _public_name(name)
        if module.__doc__:
            yield Unit("builtins", public, public, "module", clean(module.__doc__))
        for attribute, value in sorted(vars(module).items()):
            yield from _object_units(value, public, attribute, name)


def _public_name(module: str) -> str:
    if module == "posix":
        return "os"
    public = module.lstrip("_")
    return public if public in sys.stdlib_module_names else module


def _object_units(value: Any, module: str, attribute: str, origin: str) -> Iterator[Unit]:
    owner = getattr(value, "__module__", None)
    if isinstance(value, type):
        if owner not in (origin, module):
            return
        title = _title(module, attribute)
        yield from _doc_unit(value, module, title, "class")
        for name, member in sorted(vars(value).items()):
            if not isinstance(member, type):
                kind = "attribute" if inspect.isdatadescriptor(member) else "method"
                yield from _doc_unit(member, module, f"{title}.{name}", kind)
    elif inspect.isbuiltin(value) and owner in (origin, module):
        yield from _doc_unit(value, module, _title(module, attribute), "function")


def _title(module: str, attribute: str) -> str:
    return attribute if module == "builtins" else f"{module}.{attribute}"


def _doc_unit(value: Any, module: str, title: str, kind: str) -> Iterator[Unit]:
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str):
        return
    text_signature = getattr(value, "__text_signature__", None) or ""
    signature = re.sub(r"\$?\b(self|type|module|cls)\b(, /)?(, )?", "", text_signature, count=1)
    signature = signature if len(signature) < 120 else ""
    yield Unit("builtins", module, title, kind, clean(doc), signature)


def comment_units() -> Iterator[Unit]:
    """Yield blocks of whole-line comments that read as English sentences."""
    for module, path in stdlib_sources():
        try:
            with tokenize.open(path) as source:
                tokens = list(tokenize.generate_tokens(source.readline))
        except (SyntaxError, tokenize.TokenError):
            continue
        block: list[str] = []
        last_row = -2
        for token in tokens:
            whole_line = token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
            if whole_line and token.start[0] != last_row + 1 and block:
                yield from _comment_unit(module, block)
                block = []
            if whole_line:
                block.append(re.sub(r"^#+:? ?", "", token.string))
                last_row = token.start[0]
        if block:
            yield from _comment_unit(module, block)


def _comment_unit(module: str, block: list[str]) -> Iterator[Unit]:
    paragraphs = [p for p in clean("\n".join(block)) if _looks_like_prose(p) and "\n" not in p]
    paragraphs = [p for p in paragraphs if p[0].isupper() and p[-1] in ".:!?)" and len(p) >= 70]
    if paragraphs:
        yield Unit("comments", module, module, "comment", paragraphs)


class _HtmlText(HTMLParser):
    """Collects the text of an HTML page, a paragraph per block element."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"p", "div", "li", "dt", "dd", "h1", "h2", "h3", "h4", "pre", "section"}:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        self.parts.append(data.replace("\u00b6", ""))


def file_units() -> Iterator[Unit]:
    """Yield the help pages and readme files that lie inside the library."""
    root = stdlib_folder()
    names = [
        "idlelib/help.html",
        "idlelib/README.txt",
        "idlelib/extend.txt",
        "email/architecture.rst",
        "distutils/README",
        "ctypes/macholib/README.ctypes",
    ]
    for name in names:
        path = root / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".html":
            parser = _HtmlText()
            parser.feed(text)
            text = "".join(parser.parts)
        text = re.sub(r"(?m)^\s*-? ?(bpo|gh|Issue)[-# ]*\d+: ?", "", text)
        paragraphs = [p for p in clean(text) if _looks_like_prose(p)]
        for start in range(0, len(paragraphs), 6):
            yield Unit("files", name, name, "text", paragraphs[start : start + 6])


def build_corpus() -> list[Unit]:
    """Read, clean and deduplicate everything; the order is that of preference among copies."""
    seen: set[str] = set()
    units: list[Unit] = []
    for make in (topic_units, builtin_units, docstring_units, file_units, comment_units):
        for unit in make():
            fresh = []
            for paragraph in unit.paragraphs:
                key = re.sub(r"\W+", "", paragraph.lower())
                if len(key) >= 12 and key not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            # A docstring robbed of its first paragraph no longer says what it is about.
            if fresh and (fresh[0] == unit.paragraphs[0] or unit.kind in {"section", "text"}):
                unit.paragraphs = fresh
                units.append(unit)
    return units


# ------------------------------------------------------------------------------------------------
# Pages: what the model reads, drawn anew each epoch
# ------------------------------------------------------------------------------------------------

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "You are a helpful assistant that answers questions about the Python language.",
    "You are a concise assistant. Answer in a few sentences.",
]
WHAT = [
    "What does {} do?",
    "What is {}?",
    "Explain {}.",
    "Describe {}.",
    "What is {} for?",
    "Tell me about {}.",
    "what does {} do",
    "Can you explain {}?",
    "How do I use {}?",
]
SIGNATURE = [
    "Show the signature of {}.",
    "What is the signature of {}?",
    "What arguments does {} take?",
    "How is {} called?",
]
MODULE = [
    "What is the {} module?",
    "What does the {} module do?",
    "What is the {} module for?",
    "Tell me about the {} module.",
    "Describe the {} module.",
]
TYPE = [
    "What is a {}?",
    "What is the {} type?",
    "Explain the {} type.",
    "What does {} do?",
    "What is {} in Python?",
    "Tell me about the {} type.",
    "What is a {} in Python?",
]
SECTION = [
    "Explain {}.",
    "Tell me about {}.",
    "What should I know about {}?",
    "Describe {}.",
    "What is {}?",
    "What does the manual say about {}?",
    "How do {} work?",
]
MORE = ["Tell me more.", "More, please.", "Go on.", "What else?", "Continue."]
# The only sentences here that are not Python's own: a demo's first message is often a greeting.
GREETINGS = [
    "Hello",
    "Hello!",
    "Hi",
    "Hi there!",
    "Hey",
    "Good morning",
    "hello",
    "Who are you?",
    "What can you do?",
    "Help",
]
GREETING_REPLY = (
    "Hello. I am a small demonstration model. I have read the documentation inside Python. Ask me "
    "about a function, a class, a module or a statement."
)

Message = dict[str, str]


def render_chat(messages: list[Message], add_generation_prompt: bool = False) -> str:
    """Render messages as the tokenizer's chat template does (a test in `main` compares them)."""
    parts = [BOS]
    parts += [f"<|{m['role']}|>{m['content'].strip()}{EOS}" for m in messages]
    return "".join(parts) + (ASSISTANT if add_generation_prompt else "")


def _answer(paragraphs: list[str], limit: int) -> tuple[str, list[str]]:
    """Take whole paragraphs up to `limit` characters; return them and the rest."""
    taken = [paragraphs[0]]
    rest = paragraphs[1:]
    while rest and (len("\n\n".join(taken)) + len(rest[0]) < limit or taken[-1].endswith(":")):
        taken.append(rest.pop(0))
    return "\n\n".join(taken), rest


def chat_subject(unit: Unit) -> bool:
    """Say whether a question can be asked about this unit that its text answers."""
    if unit.kind in {"comment", "text"} or is_private(unit.title):
        return False
    first = unit.paragraphs[0]
    if unit.kind == "section":
        return _looks_like_prose(first) and first[0].isupper()
    return 16 <= len(first) <= 900 and first.count(" ") >= 2


def make_chat(unit: Unit, rng: random.Random) -> list[Message]:
    """Turn a unit into a short conversation: a question, its documentation, perhaps a second."""
    title, questions = unit.title, WHAT
    if unit.kind == "section":
        title, questions = title[0].lower() + title[1:], SECTION
    elif unit.kind == "module":
        questions = MODULE + WHAT[:2]
    elif unit.kind == "class" and "." not in title and title.islower():
        questions = TYPE
    elif unit.kind in {"function", "method"} and rng.random() < 0.25:
        title += "()"
    answer, rest = _answer(unit.paragraphs, rng.choice([120, 300, 600]))
    turns = [(rng.choice(questions).format(title), answer)]
    if unit.signature and unit.kind in {"function", "method"}:
        ask = (rng.choice(SIGNATURE).format(unit.title), unit.title + unit.signature)
        draw = rng.random()
        turns = [ask] if draw < 0.15 else [*turns, ask] if draw < 0.25 else turns
    elif rest and rng.random() < 0.3:
        turns.append((rng.choice(MORE), _answer(rest, 500)[0]))
    return _with_system(
        [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ],
        rng,
    )


def _with_system(messages: list[Message], rng: random.Random) -> list[Message]:
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    return messages


def _render_unit(unit: Unit, rng: random.Random) -> str:
    """Give a unit one of several headings, so that the model sees names in running text too."""
    if unit.kind in {"comment", "text"}:
        return unit.text
    if unit.kind == "section":
        return f"{unit.title}\n\n{unit.text}" if rng.random() < 0.8 else unit.text
    draw = rng.random()
    if draw < 0.55:
        return f"{unit.title}{unit.signature}\n\n{unit.text}"
    if draw < 0.85:
        return f"The {unit.kind} {unit.title}: {unit.text}"
    return unit.text


def epoch_pages(
    units: list[Unit], rng: random.Random, prefer_long: bool = False, stage: int = 0
) -> list[str]:
    """Return one epoch of shuffled pages: runs of neighbouring units, and conversations.

    Stage 0 has all units; later stages have the core units and one in ten of the others; stage 2
    has more conversations.
    """
    copies = {"topics": 2 if stage == 2 else 3, "builtins": 1 if stage == 2 else 2}
    if stage:
        units = [unit for unit in units if unit.core or rng.random() < 0.1]
    groups: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.source, unit.group), []).append(unit)
    sizes = [1200, 3000, 6000] if prefer_long else [200, 600, 1500, 4000]
    pages: list[str] = []
    for (source, _), members in groups.items():
        # The best prose counts several times.
        for _ in range(copies.get(source, 1)):
            run: list[str] = []
            size = rng.choice(sizes)
            for unit in members:
                run.append(_render_unit(unit, rng))
                if sum(map(len, run)) >= size:
                    pages.append(BOS + "\n\n".join(run) + EOS)
                    run, size = [], rng.choice(sizes)
            if run:
                pages.append(BOS + "\n\n".join(run) + EOS)
    for unit in filter(chat_subject, units):
        if stage == 2:
            chats = 2
        else:
            likely = 1.0 if unit.source == "topics" or "." not in unit.title else 0.5
            chats = int(rng.random() < likely)
        pages += [render_chat(make_chat(unit, rng)) for _ in range(chats)]
    for _ in range(100 if stage == 2 else 20):
        greeting = [
            {"role": "user", "content": rng.choice(GREETINGS)},
            {"role": "assistant", "content": GREETING_REPLY},
        ]
        pages.append(render_chat(_with_system(greeting, rng)))
    rng.shuffle(pages)
    return pages


# ------------------------------------------------------------------------------------------------
# Tokenizer and model
# ------------------------------------------------------------------------------------------------


def train_tokenizer(units: list[Unit], vocabulary: int, seed: int) -> Any:
    """Train a byte-level BPE on one epoch of training pages and wrap it for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pages = epoch_pages(units, random.Random(seed))
    plain = [re.sub(r"<\|\w+\|>", "\n", page) for page in pages]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(plain, trainer)
    # As in Llama, plain text gets a beginning-of-text token; the chat template writes its own.
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: Any) -> Any:
    """Return the model's shape: 8 Llama layers of width 192 with grouped-query attention."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


def make_model(config: Any, seed: int) -> Any:
    """Return a fresh float32 model; projections into the residual stream start smaller."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(scale)
    if model.num_parameters() > MAX_PARAMETERS:
        raise SystemExit(f"{model.num_parameters():,} parameters, over {MAX_PARAMETERS:,}")
    return model


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


class TokenStream:
    """An endless stream of training tokens: epochs of pages, cut into windows on demand."""

    def __init__(self, units: list[Unit], tokenizer: Any, seed: int) -> None:
        self.units = units
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.epochs = 0
        self.prefer_long = False
        self.stage = 0
        self._pages: list[str] = []
        self._buffer: list[int] = []

    def _fill(self) -> None:
        if not self._pages:
            self._pages = epoch_pages(self.units, self.rng, self.prefer_long, self.stage)
            self.epochs += 1
        pages, self._pages = self._pages[:256], self._pages[256:]
        # The pages carry their special tokens in writing, so none may be added here.
        for ids in self.tokenizer(pages, add_special_tokens=False)["input_ids"]:
            self._buffer += ids

    def enter_stage(self, stage: int) -> None:
        """Start an epoch of this stage, unless one has begun; see `epoch_pages`."""
        if stage != self.stage:
            self.stage, self._pages = stage, []

    def batch(self, rows: int, length: int) -> Any:
        """Return a (rows, length + 1) tensor of consecutive windows."""
        import torch

        need = rows * length + 1
        while len(self._buffer) < need:
            self._fill()
        flat = self._buffer[:need]
        del self._buffer[: need - 1]
        return torch.tensor([flat[i * length : (i + 1) * length + 1] for i in range(rows)])


def learning_rate(progress: float) -> float:
    """Return the factor on the peak rate at `progress` in [0, 1]: warm up, then half a cosine."""
    if progress < 0.02:
        return max(progress, 1e-3) / 0.02
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98))


def window_length(progress: float, step: int) -> int:
    """Choose a step's context: 256 first, 512 from 75 %, some 1,024 and 2,048 from 85 % on."""
    if progress < 0.75:
        return 256
    if progress < 0.85:
        return 512
    return {0: 1024, 4: 1024, 8: 2048}.get(step % 12, 512)


class Muon:
    """Muon: momentum made orthogonal by Newton-Schulz iterations, for the layers' matrices.

    torch.optim.Muon does the same one matrix at a time. Here the matrices of one shape go through
    the iterations as one batch, which on a busy two-core machine is several times faster.
    """

    def __init__(self, matrices: list[Any], lr: float, weight_decay: float) -> None:
        self.param_groups = [{"lr": lr, "weight_decay": weight_decay}]
        self.shapes: dict[tuple[int, int], list[Any]] = {}
        for matrix in matrices:
            short, long = sorted(matrix.shape)
            self.shapes.setdefault((short, long), []).append(matrix)
        self.momentum: dict[tuple[int, int], Any] = {}

    @staticmethod
    def _wide(tensor: Any) -> Any:
        return tensor.T if tensor.shape[0] > tensor.shape[1] else tensor

    def step(self) -> None:
        """Update every matrix from its gradient."""
        import torch

        group = self.param_groups[0]
        for shape, matrices in self.shapes.items():
            gradient = torch.stack([self._wide(matrix.grad) for matrix in matrices])
            momentum = self.momentum.setdefault(shape, torch.zeros_like(gradient))
            momentum.lerp_(gradient, 0.05)
            update = orthogonal(gradient.lerp(momentum, 0.95))
            # This size gives updates the root mean square that AdamW's typically have.
            update *= group["lr"] * 0.2 * math.sqrt(shape[1])
            for matrix, change in zip(matrices, update, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                self._wide(matrix).sub_(change)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to continue."""
        return {"momentum": self.momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.momentum = state["momentum"]


def orthogonal(batch: Any) -> Any:
    """Return roughly U V^T of each wide matrix U S V^T in the batch, by five iterations."""
    x = batch.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.float()


def make_optimizers(model: Any, args: argparse.Namespace) -> list[Any]:
    """Return AdamW for everything, or for all but the layers' matrices, which Muon gets."""
    import torch

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." not in n]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    if args.optimizer == "adamw":
        others, matrices = others + matrices, []
    adam_groups = [
        {"params": others, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(adam_groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    optimizers: list[Any] = [adamw]
    if matrices:
        optimizers.append(Muon(matrices, args.muon_lr, args.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def make_loss(model: Any, compile_it: bool) -> Callable[[Any], Any]:
    """Return a function from a window batch to its mean cross-entropy in nats."""
    import torch
    import torch.nn.functional as functional

    def loss(inputs: Any, targets: Any) -> Any:
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    run = torch.compile(loss, dynamic=False) if compile_it else loss
    return lambda window: run(window[:, :-1].contiguous(), window[:, 1:].contiguous())


class Trainer:
    """Holds float32 master weights and a bfloat16 copy that does the arithmetic."""

    def __init__(self, args: argparse.Namespace, model: Any, stream: TokenStream) -> None:
        import copy

        import torch

        self.args = args
        self.master = model
        self.worker = copy.deepcopy(model).to(torch.bfloat16)
        self.stream = stream
        self.optimizers = make_optimizers(model, args)
        self.loss = make_loss(self.worker, not args.no_compile)
        self.step = 0
        self.tokens = 0
        self.spent = 0.0
        self.recent: list[float] = []

    @property
    def progress(self) -> float:
        """Return the finished share of the schedule, by tokens if set, else by the clock."""
        if self.args.tokens:
            return self.tokens / self.args.tokens
        return self.spent / (60 * self.args.minutes)

    def train_step(self) -> None:
        """Do one step: forward and backward in bfloat16, update in float32, copy back."""
        import torch

        length = 256 if self.args.short_context else window_length(self.progress, self.step)
        self.stream.prefer_long = length > 512
        self.stream.enter_stage((self.progress > 0.2) + (self.progress > 0.5))
        # Early on, when any gradient points the right way, more steps beat bigger ones.
        tokens = self.args.batch_tokens // (2 if length == 256 else 1)
        loss = self.loss(self.stream.batch(tokens // length, length))
        loss.backward()
        with torch.no_grad():
            pairs = list(zip(self.master.parameters(), self.worker.parameters(), strict=True))
            for master, worker in pairs:
                master.grad = worker.grad.float()
                worker.grad = None
            torch.nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * learning_rate(min(self.progress, 1.0))
                optimizer.step()
            for master, worker in pairs:
                worker.copy_(master)
        self.step += 1
        self.tokens += tokens
        self.recent = [*self.recent[-49:], loss.item()]

    def run(self) -> None:
        """Train until the schedule ends, reporting and checkpointing on the way."""
        last_report = last_save = started = time.time()
        before = self.spent
        while self.progress < 1:
            self.train_step()
            now = time.time()
            self.spent = before + now - started
            if now - last_report > 15 or self.step == 1:
                last_report = now
                self.report()
            if now - last_save > 180:
                last_save = now
                self.save()
        if self.recent:
            self.report()
            self.save()

    def report(self) -> None:
        """Print one line: how far, how good, how fast, how long to go."""
        left = self.spent * (1 - self.progress) / max(self.progress, 1e-6)
        loss = sum(self.recent) / max(len(self.recent), 1)
        print(
            f"step {self.step} {self.progress:6.1%} loss {loss:.3f} "
            f"{self.tokens / max(self.spent, 1e-6):,.0f} tokens/s epoch {self.stream.epochs} "
            f"ETA {left / 60:.1f} min",
            flush=True,
        )

    def save(self) -> None:
        """Write a checkpoint that `--resume` continues from."""
        import torch

        folder = Path(self.args.checkpoints)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.master.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "spent": self.spent,
            "epochs": self.stream.epochs,
            "rng": self.stream.rng.getstate(),
        }
        torch.save(state, folder / "state.tmp")
        os.replace(folder / "state.tmp", folder / "state.pt")

    def resume(self) -> None:
        """Continue from the last checkpoint, in a fresh epoch of pages."""
        import torch

        state = torch.load(Path(self.args.checkpoints) / "state.pt", weights_only=False)
        self.master.load_state_dict(state["model"])
        self.worker.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.spent = state["step"], state["tokens"], state["spent"]
        self.stream.epochs = state["epochs"]
        self.stream.rng.setstate(state["rng"])


# ------------------------------------------------------------------------------------------------
# Evaluation and packaging
# ------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """Held-out quality over a set of texts."""

    tokens: int
    characters: int
    nats: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.characters


def evaluate(model: Any, tokenizer: Any, texts: list[str]) -> Score:
    """Score texts one by one, each from its own beginning, cut at the model's context."""
    import torch

    total = Score(0, 0, 0.0)
    model.eval()
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:2048]
            tensor = torch.tensor([ids])
            logits = model(input_ids=tensor[:, :-1], use_cache=False).logits[0].float()
            nats = torch.nn.functional.cross_entropy(logits, tensor[0, 1:], reduction="sum")
            total.tokens += len(ids) - 1
            total.characters += len(tokenizer.decode(ids, skip_special_tokens=True).encode())
            total.nats += nats.item()
    return total


def held_out_texts(units: list[Unit]) -> tuple[list[str], list[str]]:
    """Return the held-out units as plain pages and, where they can be asked about, as chats."""
    held = [unit for unit in units if unit.held_out]
    pages = [BOS + _render_unit(unit, random.Random(1)) + EOS for unit in held]
    chats = [render_chat(make_chat(u, random.Random(2))) for u in held if chat_subject(u)]
    return pages, chats


def generate(model: Any, tokenizer: Any, prompt: str, chat: bool, count: int, **how: Any) -> str:
    """Return the model's continuation of a prompt, or its reply to a user message."""
    import torch

    if chat:
        prompt = render_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
    inputs = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")
    torch.manual_seed(0)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=count, **{"do_sample": False, **how})
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


SAMPLES = [
    ("The list type in Python", False, {}),
    ("A function is", False, {}),
    ("The with statement", False, {"do_sample": True, "temperature": 0.8, "top_p": 0.95}),
    ("What does os.path.join do?", True, {}),
    ("Explain the for statement.", True, {}),
    ("What is a dictionary?", True, {"do_sample": True, "temperature": 0.8, "top_p": 0.95}),
    ("Hello!", True, {}),
]


def make_samples(model: Any, tokenizer: Any) -> str:
    """Run the sample prompts and return them as Markdown, as produced."""
    parts = []
    for prompt, chat, how in SAMPLES:
        text = generate(model, tokenizer, prompt, chat, 80, **how)
        mode = "sampled at temperature 0.8, top-p 0.95" if how else "greedy"
        body = "\n".join(("    " + line).rstrip() for line in text.strip().split("\n"))
        parts.append(f"{'Chat' if chat else 'Text'}, {mode}, prompt `{prompt}`:\n\n{body}\n")
    return "\n".join(parts)


def model_card(facts: dict[str, Any], samples: str) -> str:
    """Fill in the model card with the numbers of this run."""
    sources = "\n".join(
        f"| {name} | {count:,} | {size:,} |" for name, (count, size) in facts["sources"].items()
    )
    return f"""---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [llama, tiny, demo]
---

# PlanetServe demo model

A {facts["parameters"]:,}-parameter language model that has read nothing but the documentation
inside Python. It exists so that PlanetServe's tests, examples, chat demo, output verification and
speculative decoding run on a real model, on a laptop's CPU, without a download. Its text reads as
English about Python; what it says is often wrong.

## Architecture

Llama (`LlamaForCausalLM`), {facts["layers"]} decoder layers, hidden size 192, 6 attention heads
and 2 key/value heads of width 32, feed-forward size 640, tied embeddings, RoPE with the default
base, 2,048 positions. {facts["parameters"]:,} parameters in bfloat16; `model.safetensors` is
{facts["file_bytes"]:,} bytes.

## Tokenizer

Byte-level BPE, {facts["vocabulary"]:,} entries, trained on the same text
({facts["bytes_per_token"]:.2f} bytes per token on the held-out pages). Special tokens: `<|pad|>`,
`<|bos|>`, `<|eos|>`, `<|system|>`, `<|user|>`, `<|assistant|>`. Plain text gets a leading
`<|bos|>`. The chat template writes `<|bos|>`, then for each message its role token, its content
and `<|eos|>`; `add_generation_prompt` adds `<|assistant|>`. As the template begins with `<|bos|>`,
tokenize rendered chats with `add_special_tokens=False`. Padding is on the left.

## Data

Only text that ships with CPython {facts["python"]}, read from the standard library of the
interpreter that ran the script; the library's test packages are left out. Markup, doctests, tables
and grammar rules were removed, wrapped lines joined, and repeated paragraphs dropped.

| Source | Units | Bytes |
| --- | ---: | ---: |
{sources}

Docstrings are those of the library's Python files; builtins are those of objects written in C,
reached by introspection; topics is `pydoc_data/topics.py`; files are help pages and readme files of
IDLE, email, distutils and ctypes. The code of IDLE, lib2to3 and turtledemo is left out. From the
same units the script makes conversations: questions from a few templates ("What does os.path.join
do?", "Show the signature of ...", "Tell me more.") with the documentation as the answer, and one
greeting, the only reply that is not Python's own text. The first fifth of the training reads
everything. The rest dwells on the core: the topics and the public docstrings of
{facts["core_modules"]} much used modules, with a tenth of everything else; from half-way on it has
more conversations. An epoch of everything is about {facts["epoch_tokens"]:,} tokens, of the core
{facts["core_tokens"]:,}.

{facts["held_units"]} of {facts["units"]:,} units ({facts["held_share"]:.1%}), picked by a hash of
their text, were held out of training, tokenizer training and conversations.

## Training

{facts["steps"]:,} steps of {facts["batch_tokens"] // 2:,}, later {facts["batch_tokens"]:,} tokens:
{facts["tokens"]:,} tokens in
{facts["minutes"]:.0f} minutes on {facts["threads"]} threads of a shared CPU. Context 256, then 512
from 75 % of the run, and from 85 % on also 1,024 and 2,048.
{facts["optimizer"]},
weight decay {facts["weight_decay"]}, gradient norm clipped at 1, 2 % warm-up, cosine decay to 2 %
of the peak, no dropout; float32 weights with bfloat16 arithmetic. Seed
{facts["seed"]}.{facts["note"]}

To build it again, with CPython {facts["python"]}, torch and transformers installed:

    {facts["command"]}

Arithmetic in bfloat16 differs between processors, so the weights come out alike, not identical.

## Held-out quality

Of the saved bfloat16 weights, computed in float32:

| Held-out text | Tokens | Perplexity per token | Bits per byte |
| --- | ---: | ---: | ---: |
| Documentation | {facts["pages"].tokens:,} | {facts["pages"].perplexity:.2f} | \
{facts["pages"].bits_per_byte:.3f} |
| Conversations | {facts["chats"].tokens:,} | {facts["chats"].perplexity:.2f} | \
{facts["chats"].bits_per_byte:.3f} |
| Training pages, for comparison | {facts["train"].tokens:,} | {facts["train"].perplexity:.2f} | \
{facts["train"].bits_per_byte:.3f} |

The standard library repeats itself in more ways than deduplication catches, so some held-out
sentences have close relatives in the training text.

## Samples

As produced by this model, 80 new tokens at most.

{samples}
## Intended use and limits

For demonstrations and tests only. It has no knowledge beyond the text above, invents functions and
signatures, cannot follow instructions, write working programs, reason, or hold a long conversation,
and speaks only English. Most of its training used 256 tokens of context and only the last part
more, so its predictions get worse with distance: past about 1,000 tokens it still produces English
sentences about Python, with ever less connection between them. Greedy text tends to repeat itself.

## Licence

The weights are derived from text of the Python documentation and standard library, Copyright (c)
2001-2023 Python Software Foundation; All Rights Reserved, used under the PSF License Agreement
(PSF-2.0, https://docs.python.org/3.11/license.html). The weights are released under this
repository's MIT licence, with this notice kept.
"""


def package(model: Any, tokenizer: Any, out: Path, card: Callable[[Path, Any], str]) -> None:
    """Write the model folder beside `out`, then move each file into place."""
    import torch
    from transformers import AutoModelForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".demo_model-") as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        saved = type(model)(model.config)
        saved.load_state_dict(model.state_dict())
        saved.to(torch.bfloat16).save_pretrained(folder)
        size = (folder / "model.safetensors").stat().st_size
        if size > MAX_FILE_BYTES:
            raise SystemExit(f"model.safetensors has {size:,} bytes; at most {MAX_FILE_BYTES:,}")
        # Judge what was saved, rounding included, not what was trained.
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        (folder / "README.md").write_text(card(folder, loaded), encoding="utf-8")
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            os.replace(path, out / path.name)


def count_tokens(tokenizer: Any, pages: list[str]) -> int:
    """Return how many tokens the pages have."""
    return sum(map(len, tokenizer(pages, add_special_tokens=False)["input_ids"]))


def gather_facts(
    args: argparse.Namespace, trainer: Trainer, units: list[Unit], model: Any, size: int
) -> dict[str, Any]:
    """Collect every number the model card states."""
    tokenizer = trainer.stream.tokenizer
    pages, chats = held_out_texts(units)
    epoch = epoch_pages(trainer.stream.units, random.Random(args.seed))
    core_epoch = epoch_pages(trainer.stream.units, random.Random(args.seed), stage=2)
    short = [page for page in core_epoch if len(page) < 1500][:200]
    sources: dict[str, tuple[int, int]] = {}
    for unit in units:
        count, length = sources.get(unit.source, (0, 0))
        sources[unit.source] = (count + 1, length + len(unit.text.encode()))
    score = evaluate(model, tokenizer, pages)
    muon = f"Muon for the layers' matrices (peak rate {args.muon_lr}) and AdamW for the rest "
    held = sum(unit.held_out for unit in units)
    return {
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "file_bytes": size,
        "vocabulary": len(tokenizer),
        "python": platform.python_version(),
        "bytes_per_token": score.characters / score.tokens,
        "sources": sources,
        "epoch_tokens": count_tokens(tokenizer, epoch),
        "core_tokens": count_tokens(tokenizer, core_epoch),
        "core_modules": len(CORE_MODULES),
        "held_units": held,
        "units": len(units),
        "held_share": held / len(units),
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "batch_tokens": args.batch_tokens,
        "minutes": trainer.spent / 60,
        "threads": args.threads,
        "seed": args.seed,
        "optimizer": (muon if args.optimizer == "muon" else "AdamW ")
        + f"(peak rate {args.lr}, betas 0.9 and 0.95)",
        "note": "\n\n" + textwrap.fill(args.note, 100) if args.note else "",
        "weight_decay": args.weight_decay,
        "command": reproduce_command(args, trainer.tokens),
        "pages": score,
        "chats": evaluate(model, tokenizer, chats),
        "train": evaluate(model, tokenizer, short),
    }


def reproduce_command(args: argparse.Namespace, tokens: int) -> str:
    """Return the command that repeats this run token for token rather than by the clock."""
    parts = [f"python scripts/train_demo_model.py --tokens {tokens}"]
    defaults = make_parser().parse_args([])
    names = ["optimizer", "lr", "muon_lr", "weight_decay", "batch_tokens", "vocabulary", "seed"]
    for name in names:
        value = getattr(args, name)
        if value != getattr(defaults, name):
            parts.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(parts)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Build the demo model from the text inside this Python's standard library.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  # see what the corpus looks like, without torch\n"
        "  python scripts/train_demo_model.py --show-corpus 5\n"
        "  # a quick, poor model in another folder\n"
        "  python scripts/train_demo_model.py --minutes 5 --out my_model\n"
        "  # continue a run that was stopped\n"
        "  python scripts/train_demo_model.py --minutes 65 --resume\n",
    )
    add = parser.add_argument
    add("--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: the package's)")
    add("--minutes", type=float, default=65, help="training time; the schedule follows the clock")
    add("--tokens", type=int, default=0, help="train on this many tokens instead, however long")
    add(
        "--optimizer",
        choices=["muon", "adamw"],
        default="muon",
        help="muon: Muon for the layers' matrices, AdamW for the rest",
    )
    add("--lr", type=float, default=3e-3, help="AdamW's peak learning rate (default: %(default)s)")
    add("--muon-lr", type=float, default=4e-3, help="Muon's peak learning rate (%(default)s)")
    add("--weight-decay", type=float, default=0.1, help="for matrices (default: %(default)s)")
    add(
        "--batch-tokens",
        type=int,
        default=8192,
        help="tokens per step, a multiple of 2048; half of it while the context is 256 "
        "(default: %(default)s)",
    )
    add("--vocabulary", type=int, default=4096, help="tokenizer entries (default: %(default)s)")
    add("--seed", type=int, default=0, help="seeds weights, pages and questions")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add(
        "--short-context",
        action="store_true",
        help="stay at 256 tokens: for short trials, each context costs half a minute to compile",
    )
    add("--no-compile", action="store_true", help="skip torch.compile: slower, needs no compiler")
    add(
        "--checkpoints",
        type=Path,
        default=Path(tempfile.gettempdir()) / "demo_ckpt",
        help="folder for checkpoints, written every three minutes (default: %(default)s)",
    )
    add("--resume", action="store_true", help="continue from the last checkpoint")
    add("--note", default="", help="a sentence about this run for the model card")
    add("--show-corpus", type=int, metavar="N", help="print corpus sizes and N pages, then stop")
    return parser


def show_corpus(units: list[Unit], count: int, seed: int) -> None:
    """Print what the model would read."""
    for source in dict.fromkeys(unit.source for unit in units):
        texts = [unit.text for unit in units if unit.source == source]
        print(f"{source}: {len(texts):,} units, {sum(map(len, texts)):,} bytes")
    pages = epoch_pages(units, random.Random(seed))
    print(f"one epoch: {len(pages):,} pages, {sum(map(len, pages)):,} bytes")
    for page in pages[:count]:
        print("-" * 80 + "\n" + page)


def main() -> None:
    """Build corpus, tokenizer and model; train, evaluate and package."""
    args = make_parser().parse_args()
    print("reading the standard library", flush=True)
    units = build_corpus()
    training = [unit for unit in units if not unit.held_out]
    if args.show_corpus is not None:
        show_corpus(units, args.show_corpus, args.seed)
        return

    # Threads that spin while they wait starve each other on a shared machine: training ran several
    # times slower without this line. It only works before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(args.threads)
    print(f"{len(units):,} units; training the tokenizer", flush=True)
    tokenizer = train_tokenizer(training, args.vocabulary, args.seed)
    question = [{"role": "user", "content": "What is a list?"}]
    if tokenizer.apply_chat_template(question, tokenize=False) != render_chat(question):
        raise SystemExit("the chat template and render_chat disagree")
    model = make_model(make_config(tokenizer), args.seed)
    print(f"{model.num_parameters():,} parameters; training", flush=True)
    trainer = Trainer(args, model, TokenStream(training, tokenizer, args.seed))
    if args.resume:
        trainer.resume()
    trainer.run()

    def card(folder: Path, loaded: Any) -> str:
        size = (folder / "model.safetensors").stat().st_size
        facts = gather_facts(args, trainer, units, loaded, size)
        for name in ("pages", "chats", "train"):
            score = facts[name]
            print(f"{name}: perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits/byte")
        samples = make_samples(loaded, tokenizer)
        print(samples, flush=True)
        return model_card(facts, samples)

    package(model, tokenizer, args.out, card)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
