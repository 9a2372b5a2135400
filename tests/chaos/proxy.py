"""A proxy in front of an S3 store that does to requests and answers what networks and stores do to them.

It lives in a thread of its own; what it is to do is set from outside at any time.
"""

import asyncio
import contextlib
import dataclasses
import random
import re
import socket
import struct
import threading
import time

MAX_HEAD_BYTES = 64 << 10
PIECE_BYTES = 64 << 10
ERROR_BODY = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>InternalError</Code><Message>chaos</Message></Error>'


@dataclasses.dataclass(frozen=True)
class Harm:
    """What happens to requests; the shares are those of requests that it happens to."""

    delay_s: float = 0.0
    bytes_per_s: float = float("inf")
    #: Read, and answered with status 500.
    error_frac: float = 0.0
    #: The connection is reset in the middle of the request, or of the answer.
    reset_frac: float = 0.0
    #: The store's answer ends early, within its head if it has no body.
    truncated_frac: float = 0.0
    #: CompleteMultipartUpload alone: status 200 with an error in the body, every other time after the store did it.
    complete_error_frac: float = 0.0


class Hold:
    """The first request that matches waits, until it is released or dropped."""

    def __init__(self, matches):
        self.matches = matches
        self.caught = threading.Event()
        self.outcome = None

    def release(self, drop=False):
        self.outcome = "drop" if drop else "pass"


@dataclasses.dataclass
class Request:
    head: bytes
    method: str
    path: str
    num_bytes: int
    expects_continue: bool

    @classmethod
    def parse(cls, head):
        method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if re.search(rb"(?i)\r\ntransfer-encoding:", head):
            raise ValueError("the proxy takes no chunked requests")
        expects = re.search(rb"(?i)\r\nexpect: *100-continue", head)
        # One connection to the store for every request: none is left over from before a fault.
        head = re.sub(rb"(?i)\r\n(connection|expect):[^\r]*", b"", head)
        head = head[:-4] + b"\r\nconnection: close\r\n\r\n"
        return cls(head, method, path, int(length[1]) if length else 0, bool(expects))

    @property
    def key(self):
        """The object that it is about."""
        return self.path.partition("?")[0].removeprefix("/relora").lstrip("/")

    @property
    def completes(self):
        return self.method == "POST" and "uploadId=" in self.path

    @property
    def is_write(self):
        return self.method in ("PUT", "POST")


class Proxy:
    """Passes requests on to a store on this machine, unharmed until told otherwise."""

    def __init__(self, upstream_port):
        self.upstream_port = upstream_port
        self.port = None
        self.harm = Harm()
        self.hold = None
        #: What has been done to requests, by kind.
        self.harmed = {}
        self.random = random.Random(0)
        self.connections = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.listener = None

    def start(self):
        self.thread.start()
        self.up()

    def close(self):
        self.down()
        self._call(end_others())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()

    def up(self):
        """Listens, where it did before."""
        self._call(self._listen())

    def down(self):
        """Refuses connections, and breaks those that are open."""
        self._call(self._hang_up())

    def hold_next(self, matches):
        """Lets the next request wait for which this is true."""
        self.hold = Hold(matches)
        return self.hold

    @contextlib.contextmanager
    def harming(self, **harm):
        """Does harm for a while, and yields the counts of what was done meanwhile."""
        self.harmed = {}
        self.harm = Harm(**harm)
        try:
            yield self.harmed
        finally:
            self.harm = Harm()

    @contextlib.contextmanager
    def away(self):
        """Is not there for a while."""
        self.down()
        try:
            yield
        finally:
            self.up()

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    async def _listen(self):
        self.listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port or 0, limit=MAX_HEAD_BYTES)
        self.port = self.listener.sockets[0].getsockname()[1]

    async def _hang_up(self):
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        for writer in list(self.connections):
            reset(writer)

    async def _serve(self, reader, writer):
        self.connections.add(writer)
        try:
            while await self._pass_on(reader, writer):
                pass
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # a side that is gone, or the end of the proxy: asyncio complains of tasks that end as cancelled
        finally:
            self.connections.discard(writer)
            writer.close()

    async def _pass_on(self, reader, writer):
        """One request. Returns whether another may follow."""
        try:
            request = Request.parse(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.IncompleteReadError:
            return False
        if request.expects_continue:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not await self._let_pass(request):
            reset(writer)
            return False
        harm = self.harm
        await asyncio.sleep(harm.delay_s)
        is_reset_early = self._happens(harm.reset_frac / 2, "reset")
        if is_reset_early:
            await reader.readexactly(request.num_bytes // 2)
            reset(writer)
            return False
        is_completion_error = request.completes and self._happens(harm.complete_error_frac, "complete_error")
        is_completed_first = self.harmed.get("complete_error", 0) % 2 == 0
        if self._happens(harm.error_frac, "error") or (is_completion_error and not is_completed_first):
            await reader.readexactly(request.num_bytes)
            await answer(writer, b"200 OK" if is_completion_error else b"500 Internal Server Error", request.method)
            return True
        from_store, to_store = await asyncio.open_connection("127.0.0.1", self.upstream_port, limit=MAX_HEAD_BYTES)
        try:
            to_store.write(request.head)
            await copy(reader, to_store, request.num_bytes, harm.bytes_per_s)
            head = await from_store.readuntil(b"\r\n\r\n")
            if is_completion_error:
                await from_store.read()
                await answer(writer, b"200 OK", request.method)
                return True
            return await self._answer(request, head, from_store, writer, harm)
        finally:
            to_store.close()

    async def _let_pass(self, request):
        """Keeps the request that is waited for, until it is said what becomes of it."""
        hold = self.hold
        if hold is None or hold.caught.is_set() or not hold.matches(request):
            return True
        hold.caught.set()
        while hold.outcome is None:
            await asyncio.sleep(0.002)
        return hold.outcome == "pass"

    async def _answer(self, request, head, from_store, writer, harm):
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        num_bytes = int(length[1]) if length and request.method != "HEAD" else 0
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
        if self._happens(harm.reset_frac / 2, "reset"):
            writer.write(head[: len(head) // 2])
            reset(writer)
            return False
        if self._happens(harm.truncated_frac, "truncated"):
            writer.write(head if num_bytes > 1 else head[: len(head) // 2])
            await copy(from_store, writer, num_bytes // 2, harm.bytes_per_s)
            return False
        writer.write(head)
        if length or request.method == "HEAD" or b" 204 " in head[:16] or b" 304 " in head[:16]:
            await copy(from_store, writer, num_bytes, harm.bytes_per_s)
            return True
        # Chunks, or whatever else ends with the connection to the store.
        while piece := await from_store.read(PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
        return re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head) is not None

    def _happens(self, frac, name):
        happens = frac > 0 and self.random.random() < frac
        if happens:
            self.harmed[name] = self.harmed.get(name, 0) + 1
        return happens


async def end_others():
    """Cancels every other task, and waits for them."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def copy(reader, writer, num_bytes, bytes_per_s):
    """Copies so many bytes, not faster than told."""
    due = time.monotonic()
    while num_bytes > 0:
        piece = await reader.read(min(num_bytes, PIECE_BYTES))
        if not piece:
            raise ConnectionError("the other side ended early")
        num_bytes -= len(piece)
        writer.write(piece)
        await writer.drain()
        due += len(piece) / bytes_per_s
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def answer(writer, status, method):
    head = b"HTTP/1.1 %b\r\ncontent-type: application/xml\r\ncontent-length: %d\r\n\r\n" % (status, len(ERROR_BODY))
    writer.write(head if method == "HEAD" else head + ERROR_BODY)
    await writer.drain()


def reset(writer):
    """Breaks a connection without a farewell."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # it may have gone by itself
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
