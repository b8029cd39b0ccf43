"""The server at its real sockets: what is served, who is refused, and that nobody disturbs the others."""

import http.client
import json
import re
import socket
import threading
import time
from contextlib import ExitStack

import pytest

pytest.importorskip("starlette", reason="the extra `play` is not installed")

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from dreamer4_jax.config import UserError
from dreamer4_jax.play import protocol, server
from dreamer4_jax.play.server import BURST, PAGE, Bucket, check_address
from tests.play_fake import FakeWorld, make_engine
from tests.play_serving import serving


@pytest.fixture(scope="module")
def served():
    with serving(make_engine(world=FakeWorld(slots=4), waiting=1)) as (port, engine):
        yield port, engine


def get(port: int, path: str, **headers: str):
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    c.request("GET", path, headers=headers)
    answer = c.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


class Client:
    """A page at its WebSocket."""

    def __init__(self, port, *, origin=None, host="127.0.0.1", protocols=("dreamer4",), **options):
        # The connection goes to this machine whatever name the request bears.
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        plain.settimeout(None)
        self._open = ExitStack()
        self.ws = self._open.enter_context(
            connect(
                f"ws://{host}:{port}/play",
                sock=plain,
                origin=f"http://{host}:{port}" if origin is None else origin,
                subprotocols=list(protocols),
                max_size=None,
                **options,
            )
        )

    def say(self, t, **fields):
        self.ws.send(json.dumps({"t": t, **fields}))

    def get(self, kind, timeout=20.0):
        """The next message of a kind; frames on the way are acknowledged."""
        until = time.monotonic() + timeout
        while True:
            data = self.ws.recv(timeout=max(0.01, until - time.monotonic()))
            tree = json.loads(data) if isinstance(data, str) else protocol.unpack(data)[0]
            if tree["t"] == "frame":
                self.say("ack", n=tree["n"])
            if tree["t"] == kind:
                return tree

    def ends(self, timeout=20.0):
        """How the server closes: (code, reason)."""
        until = time.monotonic() + timeout
        while True:
            try:
                self.ws.recv(timeout=max(0.01, until - time.monotonic()))
            except ConnectionClosed as end:
                return (end.rcvd.code, end.rcvd.reason) if end.rcvd else (None, "")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._open.close()


def settles(condition, timeout=20.0):
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "did not settle"
        time.sleep(0.01)


def free(engine):
    """Nobody plays or waits, and the world has every slot back."""
    settles(lambda: engine.admitted == 0 and not engine.world.streams)


# ---------------------------------------------------------------------------------------------------------------------
# What is served


@pytest.mark.parametrize("path", PAGE)
def test_the_page_is_served_under_a_strict_policy(served, path):
    status, headers, body = get(served[0], path)
    assert status == 200 and len(body) > 100 and PAGE[path][1] in headers["content-type"]
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


def test_the_page_asks_for_nothing_but_its_own_files(served):
    for path, (_, kind) in PAGE.items():
        text = get(served[0], path)[2].decode()
        outside = [u for u in re.findall(r"""(?:https?:)?//[^\s"'`)]+""", text) if "www.w3.org/2000/svg" not in u]
        outside = [u for u in outside if kind != "text/javascript" or u.startswith("http")]  # // begins comments there
        assert not outside, (path, outside)
        assert not re.search(r"""<[^>]+\s(style|on\w+)=""", text), path  # the policy would refuse these
        for link in re.findall(r"""(?:src|href)="([^"#][^"]*)\"""", text):
            assert link in PAGE, link


@pytest.mark.parametrize(
    "path",
    [
        "/config.json",
        "/../pyproject.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page/index.html",
        "/play.js/..",
        "//etc/passwd",
        "/style.css%00",
        "/?file=/etc/passwd",
    ],
)
def test_no_request_reaches_the_file_system(served, path):
    status, _, body = get(served[0], path)
    assert status == 404 or (path.startswith("/?") and body == get(served[0], "/")[2])
    assert b"root:" not in body


def test_health_counts_sessions(served):
    status, _, body = get(served[0], "/healthz")
    assert status == 200 and json.loads(body)["ok"] is True


def test_playing_by_the_socket(served):
    port, engine = served
    with Client(port) as page:
        assert page.get("hello")["title"] == "fake"
        assert page.get("frame")["age"] == 0
        page.say("hold", keys=[3])
        page.say("hold", keys=[])
        frame = page.get("frame")
        assert frame["age"] == 1 and frame["action"] == "move 3"
    free(engine)


# ---------------------------------------------------------------------------------------------------------------------
# Who is refused


@pytest.mark.parametrize(
    "options",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "null"},
        {"origin": "https://[bad"},
        {"protocols": ("other",)},
        {"host": "rebound.example"},
        {"host": "127.0.0.1.evil.example"},
    ],
    ids=str,
)
def test_other_origins_and_other_names_are_refused_at_the_handshake(served, options):
    with pytest.raises(InvalidStatus) as refusal:
        Client(served[0], **options)
    assert refusal.value.response.status_code == 403
    assert served[1].admitted == 0


def test_a_socket_without_an_origin_is_refused(served):
    with pytest.raises(InvalidStatus):
        connect(f"ws://127.0.0.1:{served[0]}/play", subprotocols=["dreamer4"])


@pytest.mark.parametrize("host", ["rebound.example", "localhost.evil.example", "", "[", "127.0.0.2"])
def test_requests_that_name_another_host_are_refused(served, host):
    status, _, body = get(served[0], "/", Host=host)
    assert status in (400, 421) and b"<html" not in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:80", "[::1]:8765"])
def test_the_names_of_this_machine_are_answered(served, host):
    assert get(served[0], "/", Host=host)[0] == 200  # with any port: a forwarded one, say


def test_remote_needs_its_flag_and_then_every_socket_its_token():
    with pytest.raises(UserError, match="--remote"):
        check_address("0.0.0.0", 8765, False)
    with pytest.raises(UserError, match="IP address"):
        check_address("example.org", 8765, True)
    with pytest.raises(UserError, match="--port 70000"):
        check_address("127.0.0.1", 70000, False)
    assert check_address("127.0.0.1", 0, False).token == "" and check_address("::1", 0, False).token == ""
    guard, other = check_address("0.0.0.0", 8765, True), check_address("0.0.0.0", 8765, True)
    assert len(guard.token) >= 24 and guard.token != other.token
    with serving(make_engine(), guard) as (port, engine):
        own, foreign = f"token.{guard.token}", f"token.{other.token}"
        for protocols in (("dreamer4",), ("dreamer4", "token."), ("dreamer4", foreign), (own,)):
            with pytest.raises(InvalidStatus):
                Client(port, protocols=protocols)
        with pytest.raises(InvalidStatus):
            Client(port, protocols=("dreamer4", f"token.{guard.token}"), origin="http://evil.example")
        with Client(port, protocols=("dreamer4", f"token.{guard.token}")) as page:
            assert page.ws.subprotocol == "dreamer4"  # the token is not sent back
            page.get("hello")
        free(engine)


# ---------------------------------------------------------------------------------------------------------------------
# Who is dropped, while the others play on


BAD = {
    "no JSON": lambda page: page.ws.send("}{"),
    "an unknown kind": lambda page: page.say("format_disk"),
    "a path for a number": lambda page: page.say("start_recorded", episode="../../etc/passwd", frame=0),
    "binary": lambda page: page.ws.send(b"\x00" * 16),
    "a frame that never was": lambda page: page.say("ack", n=10**6),
    "a deep nest": lambda page: page.ws.send("[" * 2000),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_message_ends_its_own_session_with_a_reason(served, name):
    port, engine = served
    with Client(port) as good, Client(port) as bad:
        for page in (good, bad):
            page.get("hello")
        BAD[name](bad)
        code, reason = bad.ends()
        assert code == 1008 and reason
        good.say("step")
        assert good.get("frame")["age"] == 0 and good.get("frame")["age"] == 1
    free(engine)


def test_an_oversized_message_is_never_read_to_its_end(served):
    port, engine = served
    with Client(port) as bad:
        bad.get("hello")
        try:
            bad.ws.send("x" * 3_000_000)
        except ConnectionClosed:
            pass  # it was cut off while sending
        assert bad.ends()[0] in (1009, None)
    free(engine)


def test_a_flood_is_cut_off_and_others_play_on(served, monkeypatch):
    monkeypatch.setattr(server, "RATE", 1.0)  # whatever the speed of this machine, this is a flood
    port, engine = served
    with Client(port) as good, Client(port) as flood:
        good.get("hello")
        flood.get("hello")
        try:
            for _ in range(2 * int(BURST)):
                flood.say("rate", fps=8)
        except ConnectionClosed:
            pass
        assert flood.ends()[1] == "too many messages"
        good.say("step")
        assert [good.get("frame")["age"] for _ in range(2)] == [0, 1]
    free(engine)


def test_messages_are_refilled_at_a_rate():
    now = [0.0]
    bucket = Bucket(lambda: now[0])
    assert all(bucket.take() for _ in range(int(BURST))) and not bucket.take()
    now[0] += 1.0
    assert sum(bucket.take() for _ in range(1000)) == server.RATE - 1  # the one that was refused counts too


def test_a_page_that_reads_nothing_stops_only_itself(served):
    port, engine = served
    with Client(port) as good:
        good.get("hello")
        good.get("frame")
        deaf = Client(port, max_queue=1)  # its library stops reading the socket
        deaf.say("run", on=True)
        for _ in range(50):
            deaf.say("peek", episode=0, frame=0) if engine.catalogue.episodes else deaf.say("rate", fps=60)
        for age in range(1, 30):
            good.say("step")
            assert good.get("frame")["age"] == age
        deaf.ws.socket.close()  # gone without a farewell
    free(engine)


def test_a_socket_that_vanishes_frees_its_slot(served):
    port, engine = served
    for _ in range(12):  # three times as many as there are slots
        page = Client(port)
        page.get("frame")
        page.say("run", on=True)
        page.ws.socket.close()
        settles(lambda: engine.admitted == 0)
    free(engine)


def test_places_and_the_queue_are_bounded(served):
    port, engine = served
    pages = [Client(port) for _ in range(4)]
    for page in pages:
        page.get("hello")
    waits = Client(port)
    assert waits.get("waiting")["place"] == 1
    with Client(port) as refused:
        assert refused.ends() == (1013, "All places are taken; try again later.")
    pages[0].ws.close()
    assert waits.get("hello")["t"] == "hello"
    for page in (*pages[1:], waits):
        page.ws.close()
    free(engine)


def test_an_engine_that_fails_says_so_and_ends_every_session():
    class Broken(FakeWorld):
        def step(self, moves):
            raise RuntimeError("the device is gone")

    with serving(make_engine(world=Broken())) as (port, engine):
        with Client(port) as page:
            page.get("hello")
            page.say("step")
            assert page.ends()[1] == "the server has stopped"
        assert get(port, "/healthz")[0] == 500 and isinstance(engine.error, RuntimeError)
        with Client(port) as late:
            assert late.ends()[0] == 1013


@pytest.mark.slow
def test_ten_thousand_bad_messages_over_sockets_leave_the_server_whole():
    """Each session sends what parsers dislike until it is dropped; one page plays on all the while."""
    import random

    words = ["", "{", "null", '{"t":1}', '{"t":"hold","keys":[9]}', '{"t":"ack","n":-1}', "[" * 500, '{"t":"run"}']
    rng = random.Random(0)
    with serving(make_engine(world=FakeWorld(slots=4))) as (port, engine), Client(port) as good:
        good.get("frame")
        threads = threading.active_count()
        for i in range(10_000):
            with Client(port) as bad:
                noise = "".join(chr(rng.randrange(1, 0x2FF)) for _ in range(rng.randrange(40)))
                bad.ws.send(rng.choice(words) if i % 2 else noise)
                assert bad.ends()[0] == 1008
            if i % 500 == 0:
                good.say("step")
                good.get("frame")
        settles(lambda: engine.admitted == 1)
        assert len(engine.world.streams) == 1 and engine.error is None
        assert threading.active_count() <= threads + 2


def test_the_address_is_told_once_it_takes_connections():
    """Whoever reads it and comes at once must not be refused."""

    class Enough(Exception):
        pass

    def ready(port):
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            raise Enough

    with pytest.raises(Enough):
        server.serve(server.Starlette(), "127.0.0.1", 0, ready=ready)
