"""hivemind's peer-to-peer half, without loading the half that trains models.

`hivemind/__init__.py` imports averaging, experts, optimizers and with them scipy, which nothing
here uses: up to 40 MB for every node. `install` puts the package in place with that file left
unread, so that its subpackages can be imported; the file is read as soon as somebody asks for one
of its names, so `import hivemind; hivemind.DHT` works as ever.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from typing_extensions import override

_NAME = "hivemind"


class _Unread(ModuleType):
    """A package whose `__init__.py` runs when a name is missing."""

    @override
    def __getattr__(self, name: str) -> object:
        # A subpackage is bound to its parent's name only once it has been imported to the end.
        under_way = sys.modules.get(f"{self.__name__}.{name}")
        if under_way is not None:
            return under_way
        spec = self.__spec__
        # The import system asks for these of every module; `__version__` alone is hivemind's own.
        if not isinstance(spec, ModuleSpec) or spec.loader is None or _is_special(name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


def install() -> None:
    """Put the package in place, unless it has been imported already or is not installed."""
    spec = None if _NAME in sys.modules else importlib.util.find_spec(_NAME)
    if spec is None or spec.loader is None:
        return
    module = _Unread(_NAME)
    module.__spec__, module.__loader__ = spec, spec.loader
    module.__file__, module.__package__ = spec.origin, _NAME
    module.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[_NAME] = module


def _is_special(name: str) -> bool:
    return name.startswith("__") and name != "__version__"
