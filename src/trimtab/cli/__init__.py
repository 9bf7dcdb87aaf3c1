"""The command line: one thin function per command, which names its config and what runs it, and imports only then.

`trimtab --help` therefore loads no torch. Results go to stdout (with --json as one JSON object), progress to stderr; a
user's mistake is one line on stderr and exit status 2.
"""

from trimtab.cli.command_line import main
from trimtab.cli.commands import COMMANDS
from trimtab.cli.job import Job, Printed

__all__ = ["COMMANDS", "Job", "Printed", "main"]
