"""What passes between the router and its reader process: frames of bytes with a length before them. No pickle.

A reply is a JSON head, then the fields of the body as JSON, then every prompt as UTF-8 or as 32-bit ids.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

from baton.common.errors import InvalidRequest

HEADER: Final = struct.Struct("!I")
IDS: Final = "I"
_MAX_MESSAGE: Final = 2000  # characters

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class ReadBody:
    """A request body without its prompts, and these: text, or ids that fit in 32 bits.

    `single`: the client sent one, not a list of them. `rendered`: a chat template made it.
    """

    fields: dict[str, object]
    prompts: list[Prompt]
    single: bool = True
    rendered: bool = False

    @property
    def texts(self) -> list[str]:
        return [prompt for prompt in self.prompts if isinstance(prompt, str)]

    @property
    def prompt(self) -> Prompt | list[Prompt]:
        """As the client sent it."""
        return self.prompts[0] if self.single else self.prompts


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame; None at the end of the stream."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    return stream.read(size)


def framed(*parts: bytes) -> bytes:
    return b"".join((HEADER.pack(sum(map(len, parts))), *parts))


def encode_reply(read: ReadBody, fields: bytes) -> bytes:
    """`fields`: those of `read`, as JSON."""
    blobs = [prompt.encode() if isinstance(prompt, str) else array(IDS, prompt).tobytes() for prompt in read.prompts]
    kinds = ["text" if isinstance(prompt, str) else "ids" for prompt in read.prompts]
    sizes = [len(blob) for blob in blobs]
    content = {"fields": len(fields), "kinds": kinds, "sizes": sizes, "single": read.single, "rendered": read.rendered}
    head = json.dumps(content).encode()
    return framed(HEADER.pack(len(head)), head, fields, *blobs)


def encode_error(error: InvalidRequest) -> bytes:
    """The message is cut to a bearable length: a template may put anything into it."""
    content = {"message": str(error)[:_MAX_MESSAGE], "param": error.param, "code": error.code}
    head = json.dumps({"error": content}).encode()
    return framed(HEADER.pack(len(head)), head)


def decode_reply(frame: bytes) -> ReadBody:
    """Raises the InvalidRequest that the reader process answered with."""
    (head_size,) = HEADER.unpack_from(frame)
    at = HEADER.size + head_size
    head = json.loads(frame[HEADER.size : at])
    if error := head.get("error"):
        raise InvalidRequest(error["message"], error["param"], error["code"])
    fields = json.loads(frame[at : at + head["fields"]])
    at += head["fields"]
    prompts: list[Prompt] = []
    for kind, size in zip(head["kinds"], head["sizes"], strict=True):
        blob = memoryview(frame)[at : at + size]
        prompts.append(str(blob, "utf-8") if kind == "text" else _ids(blob))
        at += size
    return ReadBody(fields, prompts, head["single"], head["rendered"])


def _ids(blob: memoryview) -> array[int]:
    ids = array(IDS)
    ids.frombytes(blob)
    return ids
