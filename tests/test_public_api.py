"""`planetserve` offers exactly the names in `__all__`, and every one of them exists."""

from __future__ import annotations

import pytest

import planetserve
from planetserve import errors


@pytest.mark.parametrize("name", planetserve.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(planetserve, name) is not None


def test_names_are_sorted_unique_and_visible() -> None:
    assert planetserve.__all__ == sorted(set(planetserve.__all__))
    assert set(planetserve.__all__) <= set(dir(planetserve))


def test_nothing_is_loaded_under_a_name_that_is_not_public() -> None:
    assert set(planetserve._LAZY) <= set(planetserve.__all__)


def test_every_error_is_public() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PlanetServeError)
    }
    assert defined <= set(planetserve.__all__)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AutoDistributedModelForCausalML'"):
        _ = planetserve.AutoDistributedModelForCausalML
