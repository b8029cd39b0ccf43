"""The web server of `dreamer4 play`: one page, one WebSocket, and who may use them.

It binds the loopback interface. Requests must name this host (another name that resolves here, as in DNS rebinding, is
refused) and WebSockets must come from this page's own origin. Any other address needs `remote`, and then every
WebSocket also needs the token that is printed with the address. The files of the page are read at the start; no request
names a file.
"""

import asyncio
import hmac
import ipaddress
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from dreamer4_jax.config import UserError
from dreamer4_jax.play.engine import Engine, Full
from dreamer4_jax.play.protocol import MAX_MESSAGE, ProtocolError, parse

log = logging.getLogger("dreamer4.play")
PAGE = {"/": ("index.html", "text/html"), "/style.css": ("style.css", "text/css"),
        "/play.js": ("play.js", "text/javascript"), "/draw.js": ("draw.js", "text/javascript"),
        "/icon.svg": ("icon.svg", "image/svg+xml")}  # fmt: skip
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SUBPROTOCOL = "dreamer4"
OUTBOX = 64  # messages that wait for one client
RATE, BURST = 120.0, 240.0  # messages a second that a client may send, acknowledgements included, and at once
SLOW = 10.0  # seconds that one message may take to be taken
CONNECTIONS = 256
# Nothing but the page's own files; pictures of frames are made from bytes the page received.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Guard:
    """Who may connect. With `token` empty only loopback names are answered."""

    token: str = ""
    hosts: tuple[str, ...] = field(default=LOOPBACK)

    def host(self, header: str | None) -> bool:
        """Whether a Host header names this server. With a token every name will do: the token is what counts."""
        if header is None:
            return False
        try:
            name = urlsplit(f"//{header}").hostname
        except ValueError:
            return False
        return bool(name) and (bool(self.token) or name in self.hosts)

    def origin(self, origin: str | None, host: str | None) -> bool:
        """Whether a page of this very server asks. Browsers send the origin with every WebSocket."""
        if origin is None or host is None:
            return False
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and parts.netloc == host

    def admits(self, subprotocols: list[str]) -> bool:
        """Whether the offered subprotocols are the page's, and hold the token."""
        if SUBPROTOCOL not in subprotocols:
            return False
        given = "".join(s.removeprefix("token.") for s in subprotocols if s.startswith("token."))
        return not self.token or hmac.compare_digest(given.encode(), self.token.encode())


class _Hosts:
    """Refuses every request that names another host, WebSockets included, before anything else looks at it."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            connection = HTTPConnection(scope)
            if not self._guard.host(connection.headers.get("host")):
                if scope["type"] == "websocket":
                    await WebSocket(scope, receive, send).close(1008)
                else:
                    await PlainTextResponse("Unknown host.", 421, HEADERS)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Bucket:
    """Messages a client may still send: refilled at `RATE` a second, `BURST` at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._at, self._left = clock, clock(), BURST

    def take(self) -> bool:
        now = self._clock()
        self._left = min(BURST, self._left + RATE * (now - self._at))
        self._at = now
        self._left -= 1
        return self._left >= 0


class Outbox:
    """Messages on their way to one client: filled from the engine's thread, emptied by the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._waiting: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self._lock, self._count = threading.Lock(), 0
        self.reason = ""

    def send(self, payload: str | bytes) -> bool:
        with self._lock:
            if self._count >= OUTBOX:
                return False
            self._count += 1
        self._put(payload)
        return True

    def close(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._put(None)

    def _put(self, payload: str | bytes | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._waiting.put_nowait, payload)
        except RuntimeError:  # the loop has ended, and every client with it
            log.debug("a message after the end of the server")

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        while (payload := await self._waiting.get()) is not None:
            with self._lock:
                self._count -= 1
            yield payload


def _page(guard: Guard) -> list[Route]:
    files = resources.files("dreamer4_jax.play").joinpath("page")

    def route(path: str, name: str, kind: str) -> Route:
        body = files.joinpath(name).read_bytes()

        async def serve(request: Request) -> Response:
            return Response(body, media_type=kind, headers=HEADERS)

        return Route(path, serve, methods=["GET"])

    return [route(path, *file) for path, file in PAGE.items()]


def make_app(engine: Engine, guard: Guard, *, serve: Callable[[], None] | None = None) -> Starlette:
    """The application. `serve` runs in a thread of its own while the application does: the engine's loop."""

    async def health(request: Request) -> Response:
        state = {"ok": engine.error is None, "sessions": engine.admitted, "frames": engine.frames}
        return JSONResponse(state, 200 if state["ok"] else 500, HEADERS)

    async def play(socket: WebSocket) -> None:
        headers = socket.headers
        allowed = guard.origin(headers.get("origin"), headers.get("host")) and guard.admits(
            socket.scope["subprotocols"]
        )
        if not allowed:
            await socket.close(1008)  # before it is accepted: the handshake is answered with 403
            return
        outbox = Outbox(asyncio.get_running_loop())
        try:
            session = engine.admit(outbox)
        except Full:
            await socket.accept(SUBPROTOCOL)
            await socket.close(1013, "All places are taken; try again later.")
            return
        reason = ""
        try:
            await socket.accept(SUBPROTOCOL)
            reason = await _converse(socket, engine, session, outbox)
        finally:
            engine.leave(session)
        await _close(socket, reason)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        thread = threading.Thread(target=serve or engine.run, name="engine", daemon=True)
        thread.start()
        yield
        engine.stop()
        await asyncio.to_thread(thread.join, 30.0)

    app = Starlette(
        routes=[*_page(guard), Route("/healthz", health, methods=["GET"]), WebSocketRoute("/play", play)],
        lifespan=lifespan,
    )
    app.add_middleware(_Hosts, guard=guard)
    return app


async def _converse(socket: WebSocket, engine: Engine, session: Any, outbox: Outbox) -> str:
    """Passes messages both ways until one side ends it; returns why, for the client."""

    async def listen() -> str:
        bucket = Bucket()
        while True:
            event = await socket.receive()
            if event["type"] == "websocket.disconnect":
                return ""
            text = event.get("text")
            if not bucket.take():
                return "too many messages"
            if text is None:
                return "a binary message"
            try:
                message = parse(text)
            except ProtocolError as error:
                return str(error)
            if not engine.post(session, message):
                return "the server is busy"

    async def speak() -> str:
        async for payload in outbox:
            try:
                async with asyncio.timeout(SLOW):  # not wait_for: in Python 3.11 it can swallow a cancellation
                    await (socket.send_text(payload) if isinstance(payload, str) else socket.send_bytes(payload))
            except TimeoutError:
                return "the page takes no messages"
        return outbox.reason

    tasks = [asyncio.create_task(listen()), asyncio.create_task(speak())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    except (WebSocketDisconnect, OSError):
        return ""  # gone while a message was on its way
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(socket: WebSocket, reason: str) -> None:
    """Says why, if the client is still there to hear it."""
    try:
        async with asyncio.timeout(SLOW):
            await socket.close(1008 if reason else 1000, reason[:120])
    except (RuntimeError, WebSocketDisconnect, OSError, TimeoutError):
        log.debug("a client had gone before it was told: %s", reason)


# ---------------------------------------------------------------------------------------------------------------------
# Serving


def check_address(host: str, port: int, remote: bool) -> Guard:
    """The guard of an address, or `UserError` for one that may not be bound as asked."""
    if not 0 <= port < 65536:
        raise UserError(f"--port {port}: must be from 0 (any free one) to 65535")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UserError(f"--host {host!r}: must be an IP address or localhost") from None
    if local and not remote:
        return Guard(hosts=(*LOOPBACK, host))
    if not remote:
        raise UserError(
            f"--host {host}: others could reach it; add --remote to allow that (whoever connects then needs the token "
            "that is printed), or keep 127.0.0.1 and forward a port with ssh"
        )
    return Guard(token=secrets.token_urlsafe(18))


def serve(app: Starlette, host: str, port: int, *, ready: Callable[[int], None], log_level: str = "warning") -> None:
    """Serves until Ctrl-C or SIGTERM. `ready` is called with the port once connections are taken.

    Bounds that hold before a session exists: size and number of messages, open connections, silent clients.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level=log_level,
        access_log=False,
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE,
        ws_max_queue=16,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        ws_per_message_deflate=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    listener = config.bind_socket()
    listener.listen()  # whoever reads the address and comes at once waits, and is not refused
    ready(listener.getsockname()[1])
    uvicorn.Server(config).run([listener])
