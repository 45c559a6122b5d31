"""`python -m peft_audit_log [FILE]`: print the log, and compare the files that it names with what they were."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from . import log


def main(arguments: Sequence[str]) -> int:
    """Return 0; 1 if files of an adapter have changed; 2 if there is no log to read."""
    path = arguments[0] if arguments else os.environ.get(log.ENVIRONMENT)
    if not path or len(arguments) > 1:
        print(f"usage: python -m peft_audit_log FILE (or set {log.ENVIRONMENT})", file=sys.stderr)
        return 2
    try:
        events = log.read(path)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for event in events:
        names = event.get("adapter") or ", ".join(event.get("adapters", ())) or "(none)"
        print(event.get("time"), event.get("event"), names, event.get("model"), event.get("path", ""))
    found = log.changed(events)
    for folder, files in found.items():
        print(f"changed since: {', '.join(files)} in {folder}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
