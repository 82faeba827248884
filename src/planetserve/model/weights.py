"""A checkpoint's weights as a model uses them, for any stored format.

Where the configuration says that weights are stored quantised, the several tensors of each (numbers
and scales) appear here as one floating-point tensor that is dequantised when it is read, one at a
time. Everything after that (renaming, fusing of experts, `--quant_type`) sees ordinary weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planetserve.errors import ModelError
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.stored_formats.base import Header, Layout, Rule, Settings
from planetserve.model.stored_formats.table import METHODS
from planetserve.native.quantized import Numbers


@dataclass(frozen=True, slots=True)
class _Stored:
    """The tensors of one weight, by role."""

    rule: Rule
    parts: Mapping[str, str]


class Weights:
    """Tensors by the names of the weights. Not thread-safe while layouts are examined.

    Raises:
        ModelError: weights are stored in a way that is not read, or not as the configuration says.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._settings: Settings = checkpoint.quantization() or {}
        self._stored: dict[str, _Stored] = {}
        self._layouts: dict[str, Layout] = {}
        names = checkpoint.tensor_names()
        taken: set[str] = set()
        method = check_method(checkpoint.name, self._settings)
        if method is not None:
            taken = self._find(METHODS[method].rules, names)
            if not self._stored:
                raise ModelError(
                    f"{checkpoint.name}: config.json says that weights are stored as {method}, but "
                    "none is; take quantization_config out of it if they are plain"
                )
        self.names = [name for name in names if name not in taken] + list(self._stored)

    def tensor_names_of(self, name: str) -> Iterable[str]:
        """The stored tensors that the weight is made of."""
        stored = self._stored.get(name)
        return (name,) if stored is None else stored.parts.values()

    def check(self, name: str) -> tuple[torch.dtype | None, tuple[int, ...] | None]:
        """The dtype and shape of a weight, going by headers; None where any will do.

        Raises:
            ModelError: its tensors do not fit together.
        """
        stored = self._stored.get(name)
        if stored is None:
            return self._checkpoint.tensor_dtype(name), self._checkpoint.tensor_shape(name)
        return None, self._layout(name, stored).shape

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The weight in fresh memory, in `dtype` if it had to be dequantised, else as stored.

        Raises:
            ModelError: its tensors cannot be read or contradict each other.
        """
        stored = self._stored.get(name)
        if stored is None:
            return self._checkpoint.read_tensor(name)
        layout = self._layout(name, stored)
        parts = self._read_parts(stored)
        try:
            return layout.decode(parts, dtype)
        except ModelError as error:
            raise ModelError(f"{self._checkpoint.name}: {name} cannot be read: {error}") from error

    def layout(self, name: str) -> Layout | None:
        """How a weight's tensors fit together; None for a plain one.

        Raises:
            ModelError: they do not.
        """
        stored = self._stored.get(name)
        return None if stored is None else self._layout(name, stored)

    def numbers(self, name: str) -> Iterator[Numbers]:
        """The matrices of a stored weight whose layout has `numbers`, one after the other.

        Raises:
            ModelError: its tensors cannot be read or contradict each other.
        """
        stored = self._stored[name]
        layout = self._layout(name, stored)
        if layout.numbers is None:
            raise ValueError(f"{name} has no numbers to keep")
        parts = self._read_parts(stored)
        try:
            yield from layout.numbers(parts)
        except ModelError as error:
            raise ModelError(f"{self._checkpoint.name}: {name} cannot be read: {error}") from error

    def _read_parts(self, stored: _Stored) -> dict[str, torch.Tensor]:
        return {role: self._checkpoint.read_tensor(n) for role, n in stored.parts.items()}

    def _find(self, rules: Iterable[Rule], names: Mapping[str, str]) -> set[str]:
        """Find the stored weights; returns the names of their tensors."""
        taken: set[str] = set()
        for rule in rules:
            for name in names:
                if not name.endswith(rule.marker) or name in taken:
                    continue
                stem = name.removesuffix(rule.marker)
                parts = {role: stem + ending for role, ending in rule.required.items()}
                parts |= {
                    role: stem + ending
                    for role, ending in rule.optional.items()
                    if stem + ending in names
                }
                self._stored[stem + rule.weight] = _Stored(rule, parts)
                taken.update(parts.values())
        return taken

    def _layout(self, name: str, stored: _Stored) -> Layout:
        if name not in self._layouts:
            checkpoint = self._checkpoint
            for part in stored.parts.values():
                if part not in checkpoint.tensor_names():
                    raise ModelError(
                        f"{checkpoint.name}: {name} is stored quantised, but {part} is missing; "
                        "download or copy the whole model folder again"
                    )
            headers = {
                role: Header(part, checkpoint.tensor_dtype(part), checkpoint.tensor_shape(part))
                for role, part in stored.parts.items()
            }
            try:
                self._layouts[name] = stored.rule.layout(headers, self._settings)
            except ModelError as error:
                method = self._settings.get("quant_method")
                raise ModelError(
                    f"{checkpoint.name}: {name} is not stored as {method} stores weights: {error}"
                ) from error
        return self._layouts[name]


def check_method(model: str, settings: Settings) -> str | None:
    """The method that a configuration names, or None if it names none.

    Raises:
        ModelError: it is not read.
    """
    if not settings:
        return None
    method: Any = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in METHODS:
        raise ModelError(
            f"{model} cannot be served: its weights are stored quantised as {str(method)[:40]!r}, "
            f"which is not read; give the bfloat16 or float16 checkpoint, or one stored as "
            f"{', '.join(METHODS)}"
        )
    try:
        METHODS[method].check(settings)
    except ModelError as error:
        raise ModelError(f"{model} cannot be served: {error}; give another checkpoint") from error
    name: str = method
    return name
