"""How tests keep HTTP connections. The server closes one that has been idle for five seconds, httpx throws one away at
the same age: a request in that moment would meet a closed connection.
"""

from __future__ import annotations

import httpx

SHORT_LIVED = httpx.Limits(keepalive_expiry=1.0)
