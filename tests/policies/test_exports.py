"""The room's public names: each is there, is what its module defines, and none is loaded before it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trimtab import policies


@pytest.mark.parametrize("name", policies.__all__)
def test_a_public_name_is_what_its_module_defines(name: str) -> None:
    found = getattr(policies, name)
    assert found is getattr(sys.modules[f"trimtab.policies.{policies._MODULES[name]}"], name)


def test_every_place_is_public_and_nothing_else_is() -> None:
    assert sorted(policies._MODULES) == sorted(policies.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = policies.nothing


def test_the_room_loads_no_torch_by_itself() -> None:
    code = "import sys, trimtab, trimtab.policies, trimtab.policies.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
