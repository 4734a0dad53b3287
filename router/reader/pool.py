"""The router's side of its reader processes: starts them, gives each one request at a time, replaces what dies.

Event loop only. Owned by server.py; used by the endpoints.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final

from baton.common.errors import BatonError, InvalidRequest, Overloaded, Unavailable
from router.chat_templates import ChatTemplates
from router.reader.bodies import read_fields, take_prompt, take_tokens
from router.reader.frames import HEADER, ReadBody, decode_reply, framed
from router.reader.process import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, Settings

_SMALL: Final = 32 * 1024  # bytes up to which a body is read on the event loop, in a few milliseconds
_MAX_WAITING: Final = 256
_ENDING_S: Final = 5.0  # for which a process that has closed its pipes may live on
_log = logging.getLogger("baton.router")


@dataclass(frozen=True, slots=True)
class ReaderLimits:
    """For one request. `cpu_s` is processor time: a busy machine refuses nothing. `wall_s` is the last resort."""

    cpu_s: float = 2.0
    wall_s: float = 30.0
    max_chars: int = 8 * 1024 * 1024
    memory_bytes: int = 1024 * 1024 * 1024


class RequestReader:
    """Reads bodies. Small ones without messages on the spot, all others in a process that can be given up."""

    def __init__(
        self, templates: ChatTemplates | None = None, limits: ReaderLimits | None = None, num_processes: int = 2
    ) -> None:
        self.templates = templates or ChatTemplates({}, {})
        self._limits = limits or ReaderLimits()
        self._idle: asyncio.LifoQueue[_Process] = asyncio.LifoQueue()
        self._processes = [_Process(self.templates, self._limits) for _ in range(num_processes)]
        for process in self._processes:
            self._idle.put_nowait(process)
        self._num_waiting = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def start(self) -> None:
        """Have one process ready for the first chat; without a template none is started before it is needed."""
        if self.templates.sources:
            self._spawn(self._warm_up())

    async def close(self) -> None:
        """Also while processes are being started: what comes up late is ended as well."""
        self._closed = True
        for process in self._processes:
            process.kill()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(process.end() for process in self._processes))

    # ---- bodies

    async def completion(self, body: bytes) -> ReadBody:
        """`prompt` of /v1/completions. All of these raise InvalidRequest, Overloaded or Unavailable."""
        return take_prompt(read_fields(body)) if len(body) <= _SMALL else await self._read(COMPLETION, body)

    async def chat(self, body: bytes) -> ReadBody:
        """The prompt is what the chat template makes of the messages."""
        return await self._read(CHAT, body)

    async def to_tokenize(self, body: bytes) -> ReadBody:
        """`prompt`, or rendered `messages`."""
        if len(body) <= _SMALL and "messages" not in (fields := read_fields(body)):
            return take_prompt(fields)
        return await self._read(TOKENIZE, body)

    async def to_detokenize(self, body: bytes) -> ReadBody:
        """`tokens`."""
        return take_tokens(read_fields(body)) if len(body) <= _SMALL else await self._read(DETOKENIZE, body)

    # ---- processes

    async def _read(self, kind: bytes, body: bytes) -> ReadBody:
        """Cancelled while it waits, a request is not read at all; once a process has it, it is read to its end."""
        if self._num_waiting >= _MAX_WAITING:
            raise Overloaded("too many requests wait to be read", 1.0)
        self._num_waiting += 1
        try:
            process = await self._idle.get()
        finally:
            self._num_waiting -= 1
        return decode_reply(await asyncio.shield(self._spawn(self._exchange(process, framed(kind, body)))))

    async def _exchange(self, process: _Process, frame: bytes) -> bytes:
        try:
            if self._closed:
                raise Unavailable("the server is shutting down")
            try:
                return await process.exchange(frame)
            except LostWhileIdle:
                if self._closed:
                    raise
                return await process.exchange(frame)
        finally:
            self._idle.put_nowait(process)

    async def _warm_up(self) -> None:
        process = await self._idle.get()
        try:
            faults = await process.start()
            for name, fault in faults.items():
                _log.warning("chat template %s of the model cannot be used: %s", name, fault)
        except BatonError as error:
            _log.warning("the model's chat templates cannot be read: %s", error)
        finally:
            self._idle.put_nowait(process)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        """Whoever waited for it may have left: look at the error, so that asyncio does not report it."""
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()


class LostWhileIdle(Unavailable):
    """The process was gone, as far as one can tell, before the request came: another may be given it."""


class _Process:
    """One reader process, started when first needed and again after it was lost."""

    def __init__(self, templates: ChatTemplates, limits: ReaderLimits) -> None:
        self._limits = limits
        self._settings = Settings(
            templates.sources, templates.tokens, limits.max_chars, limits.cpu_s, limits.memory_bytes
        )
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> dict[str, str]:
        """Returns the templates that do not compile, with the reason."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # what lies in the working directory is not to be imported
            "-m",
            "router.reader.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        faults = json.loads(await self._roundtrip(self._process, self._settings.encode()))
        assert isinstance(faults, dict)
        return faults

    async def exchange(self, frame: bytes) -> bytes:
        """Raises InvalidRequest when the request took too much, Unavailable when the process was lost.

        The next call starts a new one. The end of an idle process is often seen only when it is spoken to.
        """
        process = self._process
        if process is not None and process.returncode is None:
            return await self._roundtrip(process, frame, LostWhileIdle)
        await self.start()
        assert self._process is not None
        return await self._roundtrip(self._process, frame)

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def end(self) -> None:
        """Kill it and wait until it is gone."""
        self.kill()
        if self._process is not None:
            await self._process.wait()

    async def _roundtrip(
        self, process: asyncio.subprocess.Process, frame: bytes, when_lost: type[Unavailable] = Unavailable
    ) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._limits.wall_s):
                process.stdin.write(frame)
                await process.stdin.drain()
                (size,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
                return await process.stdout.readexactly(size)
        except TimeoutError:
            self.kill()
            raise await self._end_of(process, Unavailable) from None
        except (OSError, asyncio.IncompleteReadError):
            raise await self._end_of(process, when_lost) from None

    async def _end_of(self, process: asyncio.subprocess.Process, when_lost: type[Unavailable]) -> BatonError:
        """Of one that was killed or has closed its pipes, which it does by ending.

        It is not killed while it does: asyncio may then look for its exit code twice and make up the second.
        """
        try:
            exit_code = await asyncio.wait_for(process.wait(), _ENDING_S)
        except TimeoutError:
            self.kill()
            exit_code = await process.wait()
        self._process = None
        if exit_code == -signal.SIGPROF:
            message = f"reading the request, or rendering the chat template, took over {self._limits.cpu_s:g} s of CPU"
            return InvalidRequest(message, None, "too_expensive")
        return when_lost(f"the reader process was lost (exit code {exit_code})")
