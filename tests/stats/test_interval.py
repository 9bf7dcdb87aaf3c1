from __future__ import annotations

import json
import math

from trimtab.stats import Interval


def test_reads_as_one_would_write_it() -> None:
    interval = Interval(estimate=0.4219, low=0.3141, high=0.5299, n=24)
    assert str(interval) == "0.42 [0.31, 0.53] (n=24)"
    assert f"{interval:.3f}" == "0.422 [0.314, 0.530]"


def test_survives_json_and_nan_becomes_null() -> None:
    interval = Interval(estimate=1.0, low=math.nan, high=math.nan, n=1, method="wilson")
    text = json.dumps(interval.to_dict(), allow_nan=False)
    assert json.loads(text) == {
        "estimate": 1.0,
        "low": None,
        "high": None,
        "n": 1,
        "level": 0.95,
        "method": "wilson",
    }
    again = Interval.from_dict(json.loads(text))
    assert math.isnan(again.low)
    assert (again.estimate, again.n, again.method) == (1.0, 1, "wilson")


def test_bounds_are_cut_to_what_can_be() -> None:
    wide = Interval(estimate=0.5, low=-5.78, high=6.78, n=2)
    assert (wide.within(0, 1).low, wide.within(0, 1).high, wide.within(0).high) == (0, 1, 6.78)
    assert wide.within(0, 1).estimate == 0.5
    below = Interval(estimate=-0.1, low=-0.3, high=-0.2, n=3)  # none of it can be
    assert (below.within(0).low, below.within(0).high) == (0, 0)
    assert math.isnan(Interval(estimate=1.0, low=math.nan, high=math.nan, n=1).within(0, 1).low)
