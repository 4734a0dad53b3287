"""A program that never ends by itself, in the place of one end of a connection."""

from __future__ import annotations

import threading

if __name__ == "__main__":
    threading.Event().wait()
