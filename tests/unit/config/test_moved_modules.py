"""Old import paths give the modules of now, and one warning that names the new path."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import planetserve
from planetserve.config.moved_modules import MOVED, MovedModules

SOURCE = Path(planetserve.__file__).parent


def file_of(module: str) -> Path:
    return SOURCE / (module.replace(".", "/") + ".py")


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_every_old_path_leads_to_a_module(old: str, new: str) -> None:
    assert not file_of(old).exists()
    assert not file_of(old).with_suffix("").exists()
    assert file_of(new).exists()


def test_an_old_path_gives_the_same_module_and_warns_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "planetserve.routing.moving", raising=False)
    with pytest.warns(
        DeprecationWarning, match="moving is now planetserve.routing.migration"
    ) as caught:
        from planetserve.routing.moving import MigrationPolicy  # type: ignore[import-not-found]
    from planetserve.routing.moving import move_ms as _again  # noqa: F401 - warnings are errors here

    assert [warning.filename for warning in caught] == [__file__]
    new = importlib.import_module("planetserve.routing.migration")
    assert new.MigrationPolicy is MigrationPolicy
    assert sys.modules["planetserve.routing.moving"] is new
    assert new.__name__ == "planetserve.routing.migration"
    assert new.__spec__ == importlib.util.find_spec("planetserve.routing.migration")


def test_other_names_are_nobodys() -> None:
    for name in ("routing.moving", "planetserve.routing.moved", "planetserve_routing.moving"):
        assert MovedModules.find_spec(name) is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("planetserve.routing.moved")


def test_a_program_that_imports_the_public_names_gets_no_warning() -> None:
    code = f"from planetserve import {', '.join(planetserve.__all__)}"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
                   check=True)  # fmt: skip
