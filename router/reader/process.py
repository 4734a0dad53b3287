"""The reader process: reads request bodies and renders chat templates, one after the other.

Started by pool.py, which speaks frames.py with it over stdin and stdout; it ends when stdin does. What comes in may be
hostile, the templates too: a profiling timer ends the process when one request takes too much processor time, also
inside a C function, and a limit on the address space turns what is too large into MemoryError.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final

from baton.common.errors import InvalidRequest
from router.chat_schema import take_chat
from router.reader.bodies import read_fields, small_json, take_prompt, take_tokens
from router.reader.chat import render_chat
from router.reader.environment import ChatEnvironment
from router.reader.frames import ReadBody, encode_error, encode_reply, framed, read_frame

COMPLETION: Final = b"p"
CHAT: Final = b"m"
TOKENIZE: Final = b"t"
DETOKENIZE: Final = b"d"


@dataclass(frozen=True, slots=True)
class Settings:
    """The first frame to the process. `cpu_s` is for one request; `max_chars` bounds what a template may make of it."""

    sources: Mapping[str, str]
    tokens: Mapping[str, object]
    max_chars: int
    cpu_s: float
    memory_bytes: int

    def encode(self) -> bytes:
        return framed(json.dumps(asdict(self)).encode())


class RequestReader:
    """What the process does with a frame: one byte that says which endpoint's body it is, and the body."""

    def __init__(self, environment: ChatEnvironment) -> None:
        self._environment = environment
        self._kinds: Mapping[bytes, Callable[[dict[str, object]], ReadBody]] = {
            COMPLETION: take_prompt,
            CHAT: self._rendered,
            TOKENIZE: lambda fields: self._rendered(fields) if "messages" in fields else take_prompt(fields),
            DETOKENIZE: take_tokens,
        }

    def answer(self, frame: bytes) -> bytes:
        try:
            read = self._kinds[frame[:1]](read_fields(frame[1:]))
            return encode_reply(read, small_json(read.fields))
        except InvalidRequest as error:
            return encode_error(error)
        except MemoryError:
            return encode_error(InvalidRequest("reading the request took too much memory", None, "too_expensive"))

    def _rendered(self, fields: dict[str, object]) -> ReadBody:
        chat = take_chat(fields)
        return ReadBody(fields, [render_chat(chat, self._environment)], rendered=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    frames, replies = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(frames)
    if first is None:
        return
    settings = Settings(**json.loads(first))
    _limit(resource.RLIMIT_AS, settings.memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    signal.setitimer(signal.ITIMER_PROF, settings.cpu_s)
    environment = ChatEnvironment(settings.sources, settings.tokens, settings.max_chars)
    reader = RequestReader(environment)
    replies.write(framed(json.dumps(environment.faults).encode()))
    replies.flush()
    signal.setitimer(signal.ITIMER_PROF, 0)
    while (frame := read_frame(frames)) is not None:
        signal.setitimer(signal.ITIMER_PROF, settings.cpu_s)
        reply = reader.answer(frame)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply)
        replies.flush()


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main()
