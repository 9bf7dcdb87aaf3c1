"""What a run of `policy train` was configured with, read back from its `run.json`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from trimtab.errors import UserError
from trimtab.policies.config import PolicyConfig
from trimtab.runs import read_record, read_typed

COMMAND = "policy train"


def read_policy_config(run: str | os.PathLike[str]) -> PolicyConfig:
    """The config of a run of `policy train`, its directory being where it lies now.

    Raises:
        UserError: there is no run, it is another command's, or it was written by another version.
    """
    record = read_record(run)
    if record["command"] != COMMAND:
        raise UserError(
            f"run {run}", f"it belongs to `{record['command']}`, not `{COMMAND}`", "name a run of `policy train`"
        )
    try:
        return dataclasses.replace(read_typed(PolicyConfig, record["config"]), run=Path(run))
    except UserError as error:
        raise UserError(
            f"run {run}", f"its config is not one of this version ({error})", "use the version that wrote it"
        ) from error
