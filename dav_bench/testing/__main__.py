"""The contract in a process of its own: `python -m dav_bench.testing NAME REPORT`, one line of JSON for each check."""

from __future__ import annotations

import json
import sys

from .checklist import Check


def main(name: str, path: str) -> None:
    with open(path, "a", encoding="utf-8") as file:

        def say(check: Check) -> None:
            file.write(json.dumps(check.to_dict()) + "\n")
            file.flush()

        from .contract import examine

        examine(name, say=say)
        file.write(json.dumps({"finished": True}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
