"""The concepts that flags stand for, as a file lists them."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import UserError
from trimtab.flags.spec import check_concepts
from trimtab.runs.user_files import read_text


def read_concepts(path: Path | str) -> dict[str, str]:
    """Names of concepts, and what each is in words, in the file's order.

    Args:
        path: a text file with `name` or `name: description` in each line; one that begins with `#` is a comment. What
            has no description is described by its name.

    Raises:
        UserError: the file cannot be read, or holds no concept or one twice.
    """
    lines = [line.strip() for line in read_text(path).split("\n")]
    parts = [line.partition(":") for line in lines if line and not line.startswith("#")]
    pairs = [(name.strip(), description.strip()) for name, _, description in parts]
    if not pairs:
        raise UserError(str(path), "it names no concept", 'give lines like "sea: the sea, ships and sailors"')
    try:
        check_concepts([name for name, _ in pairs])
    except UserError as error:
        raise UserError(str(path), f"{error.what}: {error.why}", error.hint) from None
    return {name: description or name for name, description in pairs}
