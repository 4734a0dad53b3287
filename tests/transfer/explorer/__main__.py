"""`python -m tests.transfer.explorer [--deep] [name ...]`: walk the standard worlds. Exit status 1 if one fails."""

from __future__ import annotations

import argparse
import sys

from tests.transfer.explorer.many import walking
from tests.transfer.explorer.standard import DEEP, STANDARD


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.transfer.explorer", description=__doc__)
    parser.add_argument("names", nargs="*", help="only these worlds")
    parser.add_argument("--deep", action="store_true", help="also the worlds that are too long for CI")
    parser.add_argument("--jobs", type=int, default=2, help="worlds walked at a time (default: %(default)s)")
    arguments = parser.parse_args()
    known = (*STANDARD, *DEEP)
    unknown = set(arguments.names) - {config.name for config in known}
    if unknown:
        parser.error(f"no such world: {', '.join(sorted(unknown))}")
    chosen = [config for config in known if config.name in arguments.names]
    failed = False
    with walking(chosen or (known if arguments.deep else STANDARD), arguments.jobs) as results:
        for result in results.values():
            print(result.result(), flush=True)
            failed |= result.result().violation is not None or not result.result().exhausted
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
