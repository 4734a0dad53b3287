"""What a worker asks of the interpreter that all its threads share: short turns, and a collector that finds little.

Called by whoever makes a worker process, on any thread.
"""

from __future__ import annotations

import gc
import sys

# A thread that wants the interpreter's lock waits up to this long while another computes. A chunk of KV changes threads
# half a dozen times at either end, and each turn was seen to take the whole interval; CPython's default is 5 ms. With
# 100 us bulk hand-overs came to 53 % of the link and with 20 us to 79 % (docs/transfer_performance.md).
SWITCH_INTERVAL_S = 0.00002


def shorten_turns() -> None:
    """Before the worker starts its threads."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def freeze_heap() -> None:
    """When the worker serves: what was made until now, libraries above all, is never looked through again."""
    gc.collect()
    gc.freeze()
