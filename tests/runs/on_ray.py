"""What `test_executors.py` asks, on a real Ray cluster of this machine; run by it, in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.runs import Failed, OnRay, run_stage

sys.path.insert(0, str(Path(__file__).parent))

from stages import Squares, began, square
from test_executors import (
    done,
    test_a_file_that_a_stage_did_not_write_is_a_bug,  # noqa: F401
    test_only_what_is_not_done_runs,  # noqa: F401
    test_results_are_in_order_and_a_users_mistake_fails_alone,  # noqa: F401
)


@pytest.fixture(scope="module")
def executor() -> Iterator[OnRay]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield OnRay()
    ray.shutdown()


def test_a_shard_whose_worker_is_killed_is_begun_again_so_many_times(executor: OnRay, tmp_path: Path) -> None:
    config = Squares(out=tmp_path)
    twice = replace(executor, tries=2)
    found = run_stage(square, config, [2, 3, 5, 4, 6], records=tmp_path / "records", executor=twice)
    assert found[:2] == [done(config, 2), done(config, 3)]
    assert found[4] == done(config, 6)
    assert isinstance(found[2], Failed)
    assert found[2].reason.startswith("its worker died 2 times (")
    assert isinstance(found[3], Failed)
    assert began(config) == {2: 1, 3: 2, 4: 1, 5: 2, 6: 1}
