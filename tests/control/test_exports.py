"""Public names of the rooms that load lazily: each is what its module defines, and none is loaded unasked."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from trimtab import control, policies

ROOMS = (control, policies)


@pytest.mark.parametrize(("room", "name"), [(room, name) for room in ROOMS for name in room.__all__])
def test_a_public_name_is_what_its_module_defines(room: ModuleType, name: str) -> None:
    found = getattr(room, name)
    assert found is getattr(sys.modules[f"{room.__name__}.{room._MODULES[name]}"], name)


@pytest.mark.parametrize("room", ROOMS)
def test_every_place_is_public_and_nothing_else_is(room: ModuleType) -> None:
    assert sorted(room._MODULES) == sorted(room.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = room.nothing


def test_the_rooms_load_no_torch_by_themselves() -> None:
    code = "import sys, trimtab, trimtab.control, trimtab.policies.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
