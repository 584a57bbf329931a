"""A small HTTP server with bounds on who may connect, on what clients may send and store, and on its shutdown.

It is independent of pictures and detectors, which are in app.py. Needs the extra `app` (pip install -e '.[app]').
"""

import asyncio
import contextlib
import os
import re
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from types import FrameType
from typing import ClassVar, Generic, Protocol, TypeVar

import anyio
import uvicorn
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from utils import InputError

HOST_HEADER = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/?#\s]+)(:[0-9]+)?")  # name or address, and a port
MAX_CONNECTIONS = 256
CONNECTION_SECONDS = 120.0
PART_BYTES = 2**18  # of a response, in the connection's buffer at a time
GRACE_SECONDS = 1.0  # for running requests at shutdown
EXIT_SECONDS = 4.0  # after which the process exits even if a thread is busy


class Guard:
    """ASGI middleware that answers only requests to the server's own names, and sends strict security headers.

    A page of another site can make a browser send requests to a server on the same machine. `Host` is the name that
    the browser looked up, which after DNS rebinding is the other site's; `Origin` is the site of the page.

    Args:
        app: the application.
        names: host names and addresses of the server, without ports.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]):
        self.app = app
        self.names = {f"[{name}]" if ":" in name and name[0] != "[" else name.lower() for name in names}
        headers = {
            "content-security-policy": (
                "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
                "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
            ),
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
            "referrer-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "cross-origin-opener-policy": "same-origin",
            "connection": "close",  # one request per connection, so that its time limit applies to the request
        }
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.headers]
            await send(message)

        refusal = self.refusal(Headers(scope=scope))
        app = JSONResponse({"error": refusal}, 403) if refusal else self.app
        await app(scope, receive, send_with_headers)

    def refusal(self, headers: Headers) -> str | None:
        """Why a request with these headers is refused; None if it is not."""
        hosts = [host.lower() for host in headers.getlist("host")]
        match = HOST_HEADER.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None or match[1] not in self.names:
            return f"this server's names are {', '.join(sorted(self.names))}; --allowed-host NAME adds one"
        if any(origin.lower().partition("://")[2] != hosts[0] for origin in headers.getlist("origin")):
            return "the request comes from a page of another site"
        return None


class Unread:
    """Bounds the bytes of responses that clients have not read yet.

    Beyond the bound the response that has been sent for the longest time is dropped, and its connection closed.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.sizes: dict[anyio.CancelScope, int] = {}  # the oldest first

    def response(self, content: bytes, media_type: str) -> Response:
        return _CountedResponse(self, content, media_type)


class _CountedResponse(Response):
    """A response that is sent in parts, each after the client has read the one before, so that the rest is counted."""

    def __init__(self, unread: Unread, content: bytes, media_type: str):
        super().__init__(content, media_type=media_type)
        self.unread = unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sizes = self.unread.sizes
        with anyio.CancelScope() as cancel:
            sizes[cancel] = len(self.body)
            try:
                for oldest in list(sizes)[:-1]:
                    if sum(sizes.values()) > self.unread.max_bytes:
                        del sizes[oldest]
                        oldest.cancel()
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                for start in range(0, len(self.body), PART_BYTES):
                    part = self.body[start : start + PART_BYTES]
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body"})
            finally:
                sizes.pop(cancel, None)


class Bodies:
    """Receives request bodies, with bounds on the size, number, sum and duration of those in memory.

    If number or sum is exceeded, the body that has been arriving for the longest time is dropped, so that slow clients
    do not block the others.

    Args:
        max_bytes: of one body; all together may have four times as many.
        max_count: number of bodies in memory.
        seconds: within which a body has to arrive.
    """

    def __init__(self, max_bytes: int, max_count: int, seconds: float):
        self.max_bytes, self.max_count, self.seconds = max_bytes, max_count, seconds
        self.sizes: dict[anyio.CancelScope, int] = {}  # of all bodies in memory, the oldest first
        self.arriving: set[anyio.CancelScope] = set()  # those of them that are not complete

    @contextlib.asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which is counted until the block ends.

        Raises:
            HTTPException: 413 for too many bytes, 408 if it takes too long, 503 if it was dropped.
            InputError: if the body is empty or a form.
        """
        scope = anyio.CancelScope(deadline=anyio.current_time() + self.seconds)
        self.sizes[scope] = 0
        self.arriving.add(scope)
        try:
            with scope:
                data = await self._read(request, scope)
                self.arriving.discard(scope)
            if scope.cancelled_caught:
                if anyio.current_time() < scope.deadline:
                    raise HTTPException(503, "the server is busy: send the picture again")
                raise HTTPException(408, f"the picture did not arrive within {self.seconds:g} seconds")
            yield data
        finally:
            del self.sizes[scope]
            self.arriving.discard(scope)

    async def _read(self, request: Request, scope: anyio.CancelScope) -> bytes:
        data, size = bytearray(), 0
        self._make_room(0)
        async for part in request.stream():
            size += len(part)
            self._make_room(len(part))
            if scope.cancel_called:  # dropped just now, or before this part came
                await anyio.sleep(0)  # raises
            if size <= self.max_bytes:
                data += part
            else:  # read on without keeping it: many clients see no response before they have sent everything
                data.clear()
            self.sizes[scope] = len(data)
        if size > self.max_bytes:
            raise HTTPException(413, f"the picture has more than the {self.max_bytes / 1e6:g} MB that are accepted")
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise InputError("send the picture alone as the body (curl --data-binary @photo.jpg), not as a form")
        if not data:
            raise InputError("the body is empty: POST a picture, as curl --data-binary @photo.jpg does")
        return bytes(data)

    def _make_room(self, size: int) -> None:
        """Drops bodies, the oldest first, until `size` more bytes fit."""
        while len(self.sizes) > self.max_count or sum(self.sizes.values()) + size > 4 * self.max_bytes:
            oldest = next((scope for scope in self.sizes if scope in self.arriving), None)
            if oldest is None:
                return
            self.arriving.discard(oldest)
            self.sizes[oldest] = 0
            oldest.cancel()
            if len(self.sizes) > self.max_count:  # its place is free when its task ends
                return


class Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Kept(Generic[T]):
    """Stores objects of at most `max_bytes` in total under random ids; drops the least recently used ones first."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, T] = OrderedDict()

    def add(self, value: T) -> str:
        """Returns the id, which cannot be guessed, so that only the sender can access the object."""
        key = secrets.token_urlsafe(16)
        self._kept[key] = value
        while sum(kept.num_bytes for kept in self._kept.values()) > self.max_bytes and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return key

    def get(self, key: str) -> T:
        """Raises HTTPException 404 if the id is unknown or the object was dropped."""
        if key not in self._kept:
            raise HTTPException(404, "this picture is no longer kept: send it again")
        self._kept.move_to_end(key)
        return self._kept[key]


class Connection(H11Protocol):
    """uvicorn's connection, closed after CONNECTION_SECONDS or when MAX_CONNECTIONS newer ones are open.

    This also holds if the client sends no headers or does not read the response.
    """

    connected: ClassVar[dict["Connection", asyncio.Transport]] = {}  # the oldest first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.connected[self] = transport
        self.end = self.loop.call_later(CONNECTION_SECONDS, transport.abort)
        if len(self.connected) > MAX_CONNECTIONS:
            self.connected.pop(next(iter(self.connected))).abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connected.pop(self, None)
        self.end.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Called by uvicorn when the server ends."""
        super().shutdown()
        self.loop.call_later(GRACE_SECONDS, self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn's server, whose process exits within EXIT_SECONDS of Ctrl-C or SIGTERM."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        timer = threading.Timer(EXIT_SECONDS, os._exit, (128 + sig,))  # a thread that decodes cannot be cancelled
        timer.daemon = True
        timer.start()


def make_server(app: ASGIApp) -> Server:
    """A server to `run(sockets=[listen(...)])`."""
    config = uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", loop="asyncio", log_level="error", access_log=False,
        proxy_headers=False, server_header=False,
    )  # fmt: skip
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises an InputError if the address cannot be used."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise InputError(f"cannot listen on {host}, port {port} (--host, --port): {reason}") from None
