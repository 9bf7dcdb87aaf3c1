"""Records of a corpus that cannot be read: left out and counted with their place, or refused."""

from __future__ import annotations

import sys
from typing import Literal, TypeGuard, get_args

from trimtab.errors import UserError, check_one_of

OnBadRecord = Literal["skip", "fail"]
MOST_BAD = 0.01
"""Share of all records that may be bad. Where a limit ends reading before the corpus ends, it is the share of what was
read, and one bad record may always be: of fewer than a hundred records one says nothing about the rest."""
JUDGED_EARLY = 100
"""With more bad records than this, the share is checked at once, so that what is no text at all is not read to its
end."""


class BadRecords:
    """Counts the records of one corpus, and those that are bad.

    Args:
        on_bad: `skip` leaves bad records out, up to `MOST_BAD` of all; `fail` refuses the first one.

    Attributes:
        ended: whether the corpus was read to its end, which whoever reads it says.
    """

    def __init__(self, on_bad: OnBadRecord = "skip") -> None:
        check_one_of("bad_records", on_bad, get_args(OnBadRecord))
        self.on_bad, self.records, self.bad, self.null, self.ended = on_bad, 0, 0, 0, False
        self._first: UserError | None = None

    def has_text(self, text: str | None) -> TypeGuard[str]:
        """Count a record that is not bad, and say whether it has a text: null and blank ones have none."""
        self.records += 1
        self.null += text is None
        return bool(text and text.strip())

    def add(self, problem: UserError) -> None:
        """Count a bad record. Raises its `UserError` if none may be left out, or too many are."""
        if self.on_bad == "fail":
            raise problem
        self.records, self.bad = self.records + 1, self.bad + 1
        self._first = self._first or problem
        if self.bad > JUDGED_EARLY:
            self.check()

    def check(self) -> None:
        """Raise a `UserError` that says what is wrong with the first bad record if more than `MOST_BAD` of all are."""
        first, most = self._first, MOST_BAD * self.records
        if first is not None and self.bad > (most if self.ended else max(most, 1)):
            count = f"{self.bad:,} of {self._read} {'is' if self.bad == 1 else 'are'} bad"
            raise UserError(first.what, f"{first.why} ({count}; up to {MOST_BAD:.0%} are left out)", first.hint)

    @property
    def _read(self) -> str:
        """What was read, in words."""
        return f"{'' if self.ended else 'the first '}{self.records:,} records"

    def tell(self) -> None:
        """Say on stderr what was left out."""
        said: list[str] = []
        if self._first is not None:
            what = f"{self.bad:,} of {self._read} {'is' if self.bad == 1 else 'are'} bad and left out"
            said.append(f"warning: {what}, the first is {self._first.what}: {self._first.why}")
        if self.null:
            said.append(f"note: {self.null:,} of {self._read} have null for a text and are left out")
        for line in said:
            print(f"trimtab: {' '.join(line.split())}", file=sys.stderr, flush=True)
