"""Messages of the page: exactly the known kinds are read, everything else is one clear refusal."""

import dataclasses
import gc
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dreamer4_jax.play import protocol
from dreamer4_jax.play.protocol import KINDS, ProtocolError, pack, parse, unpack

GOOD = [
    protocol.StartRecorded(3, 17),
    protocol.StartFresh(0, 2**30 - 1),
    protocol.Reset(),
    protocol.Hold((0, 6)),
    protocol.Hold(()),
    protocol.Repeat(),
    protocol.Run(True),
    protocol.Step(),
    protocol.Rewind(4),
    protocol.Steps(8),
    protocol.Rate(12.5),
    protocol.Pilot(False),
    protocol.Doubt(True),
    protocol.Record(True),
    protocol.Peek(1, 2),
    protocol.Ack(0),
]
NAMES = {kind: name for name, kind in KINDS.items()}


@pytest.mark.parametrize("message", GOOD, ids=lambda m: type(m).__name__)
def test_every_message_is_read_back(message):
    assert parse(json.dumps({"t": NAMES[type(message)], **dataclasses.asdict(message)})) == message


def test_every_kind_is_tried_above():
    assert {type(m) for m in GOOD} == set(KINDS.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("[]", "no JSON object"),
        ("[" * 2000, "no JSON"),
        ('{"t":"ack","n":' + "9" * 1500 + "}", "ack.n must be a number"),
        ('{"t":"ack","n":1e999}', "ack.n"),
        ('{"t":"ack","n":NaN}', "ack.n"),
        ('{"t":"ack","n":true}', "ack.n"),
        ('{"t":"ack","n":"1"}', "ack.n"),
        ('{"t":"ack","n":-1}', "ack.n"),
        ('{"t":"ack"}', "must have the fields"),
        ('{"t":"ack","n":1,"path":"/etc/passwd"}', "must have the fields"),
        ('{"t":"rate","fps":Infinity}', "rate.fps"),
        ('{"t":"rate","fps":0}', "rate.fps"),
        ('{"t":"run","on":1}', "run.on must be true or false"),
        ('{"t":"hold","keys":[0,1,2,3,4,5,6,7,8]}', "at most 8"),
        ('{"t":"hold","keys":[-1]}', "at most 8"),
        ('{"t":"hold","keys":"0"}', "at most 8"),
        ('{"t":["ack"],"n":1}', "unknown kind"),
        ('{"t":"start_recorded","episode":"../../etc","frame":0}', "start_recorded.episode"),
        ('{"t":"eval","code":"1"}', "unknown kind"),
        ('{"t":"reset","x":"' + "y" * 5000 + '"}', "2048 are allowed"),
    ],
)
def test_anything_else_is_refused(text, words):
    with pytest.raises(ProtocolError, match=words):
        parse(text)


def test_binary_messages_are_read_back():
    header, parts = unpack(pack({"t": "frame", "n": 3}, [b"abc", b"", b"d" * 300]))
    assert header == {"t": "frame", "n": 3, "parts": [3, 0, 300]} and parts == [b"abc", b"", b"d" * 300]
    with pytest.raises(ValueError):  # JSON has no NaN: a browser would refuse the message
        pack({"reward": float("nan")})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted({f.name for kind in KINDS.values() for f in dataclasses.fields(kind)}))
ALMOST = st.fixed_dictionaries({"t": st.sampled_from(sorted(KINDS))}).flatmap(
    lambda head: st.dictionaries(FIELDS, JSON, max_size=3).map(lambda rest: json.dumps({**head, **rest}))
)
ANYTHING = (
    st.text(max_size=200) | JSON.map(json.dumps) | ALMOST | st.binary(max_size=200).map(lambda b: b.decode("latin1"))
)


def _never_crashes(text: str) -> None:
    try:
        message = parse(text)
    except ProtocolError as error:
        assert 0 < len(str(error)) < 300  # goes into the reason of a close frame, cut there
    else:
        assert type(message) in NAMES  # what was generated happened to be one


@given(ANYTHING)
@settings(max_examples=300)
def test_a_malformed_message_is_a_refusal_and_nothing_else(text):
    _never_crashes(text)


@pytest.mark.slow
def test_ten_thousand_malformed_messages_leave_nothing_behind():
    @given(ANYTHING)
    @settings(max_examples=10_000, database=None, suppress_health_check=list(HealthCheck))
    def fuzz(text):
        nonlocal count
        count += 1
        _never_crashes(text)

    count = 0
    samples = ['{"t":"ack","n":-1}', "[" * 2000, '{"t":"hold","keys":[99,"x"]}', "\x00\xff"]
    fuzz()
    assert count >= 9_000
    # Generators keep memory of their own; the parser alone must keep none.
    tracemalloc.start()
    try:
        for text in samples * 50:
            _never_crashes(text)
        gc.collect()  # what is waiting to be collected is as much as chance will have it
        before = tracemalloc.get_traced_memory()[0]
        for text in samples * 2500:
            _never_crashes(text)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 5_000, grown
