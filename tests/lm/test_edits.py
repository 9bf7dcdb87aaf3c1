"""Edits as data: position rules, axes that are set, activations that are replaced, logs put together."""

from __future__ import annotations

import hashlib

import pytest
import torch

from trimtab.errors import UserError
from trimtab.lm import Edit, EditLog, PositionRule, activation_hash

PLACES = torch.arange(2)


@pytest.mark.parametrize(
    ("given", "text", "selected"),
    [
        ("generated", "generated", [4, 5, 6]),
        ("prompt", "prompt", [0, 1, 2, 3, 4]),
        ("all", "all", [0, 1, 2, 3, 4, 5, 6]),
        ("1:3", "1:3", [1, 2]),
        ([4, 1, 1], "1,4", [1, 4]),
        ("6,-2", "-2,6", [3, 6]),
        ("2", "2", [2]),
    ],
)
def test_rules_select_positions(given: str | list[int], text: str, selected: list[int]) -> None:
    rule = PositionRule.parse(given)
    assert str(rule) == text
    assert PositionRule.parse(text) == rule == PositionRule.parse(rule)
    positions = torch.arange(7).expand(2, -1)
    found = rule.selects(positions, torch.tensor([[5], [5]]))
    assert found.tolist() == [[i in selected for i in range(7)]] * 2
    assert rule.selects(torch.tensor([3, 6]), torch.tensor([5, 5])).tolist() == [i in selected for i in (3, 6)]


@pytest.mark.parametrize("text", ["last", "5:2", "1,", "1;2", ""])
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="allowed are generated, prompt, all or START:STOP"):
        PositionRule.parse(text)


def test_axes_get_their_target_and_other_directions_are_added() -> None:
    directions = torch.eye(4)
    directions[2] = -directions[2]
    directions[3] = 0.5
    x = torch.tensor([[1e4, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    target = torch.tensor([[0.1234567, float("nan"), 0.3], [float("nan"), float("nan"), 9.0]])
    edit = Edit(torch.tensor([[0, 3, 2], [-1, 3, -1]]), torch.full((2, 3), 0.25), target=target)
    change = edit.change(directions, PLACES, PLACES)
    found = change.of(x)
    assert found[0].tolist() == pytest.approx([0.1234567 + 0.125, 2.125, -0.3 + 0.125, 4.125])
    assert found[1].tolist() == [5.125, 6.125, 7.125, 8.125]
    alone = Edit(edit.feature[:, :1], edit.coefficient[:, :1], target=target[:, :1]).change(directions, PLACES, PLACES)
    assert alone.of(x)[0, 0] == target[0, 0]


def log_of(edit: Edit, kept: dict[int, torch.Tensor] | None = None) -> EditLog:
    rows = len(edit.feature)
    zeros, nothing = torch.zeros(rows), torch.zeros(rows, dtype=torch.long)
    columns = {name: zeros for name in ("x_norm", "delta_norm", "action_logp", "value")}
    replaced = [0] * rows if edit.replacement is None else [activation_hash(row) for row in edit.replacement]
    nan = torch.full_like(edit.coefficient, float("nan"))
    return EditLog(
        site=nothing, row=nothing, position=torch.arange(rows), n_allowed=nothing, feature=edit.feature,
        coefficient=edit.coefficient, requested=edit.coefficient, target=nan if edit.target is None else edit.target,
        replaced=torch.tensor(replaced), kept=kept or {}, **columns,
    )  # fmt: skip


def test_a_log_gives_back_the_edits_it_was_made_of() -> None:
    values = torch.randn(2, 8)
    kept = {activation_hash(row): row for row in values}
    patched = log_of(Edit(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), replacement=values), kept)
    added = log_of(Edit(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3)))
    both = EditLog.cat([patched, added, EditLog.empty(2)])
    assert both.feature.tolist() == [[0, -1, -1], [0, -1, -1], [1, 1, 1]]
    edit = both.take(torch.tensor([2, 1, 0])).edit()
    assert edit.target is None
    assert edit.replacement is not None
    assert edit.replacement[0].isnan().all()
    assert torch.equal(edit.replacement[1:], values.flip(0))
    assert added.edit().replacement is None


def test_a_log_is_split_into_what_slices_give() -> None:
    """With of `kept` what each part needs."""
    values = torch.randn(3, 8)
    kept = {activation_hash(row): row for row in values}
    log = log_of(Edit(torch.tensor([[4], [5], [6]]), torch.ones(3, 1), replacement=values), kept)
    for part, place in zip(log.split([1, 0, 2]), (slice(0, 1), slice(1, 1), slice(1, 3)), strict=True):
        for name, column in part.columns.items():
            torch.testing.assert_close(column, log.columns[name][place], rtol=0, atol=0, equal_nan=True)
        assert list(part.kept) == list(kept)[place]


def test_a_hash_is_the_first_bytes_of_sha256() -> None:
    row = torch.tensor([1.0, -2.0])
    digest = hashlib.sha256(row.numpy().tobytes()).hexdigest()
    assert f"{activation_hash(row) & (1 << 64) - 1:016x}" == digest[:16]
    assert activation_hash(row.bfloat16()) != activation_hash(row)


def test_hashes_alone_cannot_be_replayed() -> None:
    log = log_of(Edit(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), replacement=torch.randn(2, 8)))
    with pytest.raises(UserError) as caught:
        log.edit()
    assert caught.value.line == (
        "replaced activations: the log holds their hashes, not their values; "
        "decode again with a source that was given keep_replacements=True"
    )
