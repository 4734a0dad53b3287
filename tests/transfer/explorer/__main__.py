"""`python -m tests.transfer.explorer [--deep] [name ...]`: walk the standard worlds. Exit status 1 if one fails."""

from __future__ import annotations

import argparse
import sys

from tests.transfer.explorer.search import explore
from tests.transfer.explorer.standard import DEEP, STANDARD


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.transfer.explorer", description=__doc__)
    parser.add_argument("names", nargs="*", help="only these worlds")
    parser.add_argument("--deep", action="store_true", help="also the worlds that take longer than five minutes")
    arguments = parser.parse_args()
    worlds = [*STANDARD, *DEEP] if arguments.deep or arguments.names else STANDARD
    failed = False
    for config in worlds:
        if not arguments.names or config.name in arguments.names:
            result = explore(config)
            print(result, flush=True)
            failed |= result.violation is not None or not result.exhausted
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
