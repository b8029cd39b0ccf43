"""Reading a compiled program: trips of loops, cycles, and collectives with their groups and bytes."""

from pathlib import Path

import pytest

from dreamer4_jax.parallel.accelerators import CHIPS
from dreamer4_jax.parallel.aot import scope_of, wire_seconds
from dreamer4_jax.parallel.hlo import Collective, Module, array_bytes, costs, groups

# Written by hand in the compiler's notation: two loops, and collectives of every form.
TEXT = (Path(__file__).parent / "golden" / "hlo" / "step.txt").read_text()


def test_loops_are_multiplied_by_their_trips():
    """The inner loop runs from 1 to 4, the outer one as often as it is told."""
    found = costs(Module.parse(TEXT), trips=5, scope_of=scope_of)
    assert found.cycles == 5 * 3 * 100 + 5 + 7
    assert found.scopes == {"student/mlp": 1500, "other": 12}
    with pytest.raises(ValueError, match="loop loop has no constant number of trips"):
        costs(Module.parse(TEXT))


def test_collectives_are_counted_once_each_with_their_bytes():
    found = costs(Module.parse(TEXT), trips=5).collectives
    by = {(at.kind, at.size): at for at in found.values()}
    loop, hidden = by["all-gather", 4], by["all-gather", 2]
    assert (loop.count, loop.bytes, loop.hidden) == (15, 15 * 32 * 128 * 4, False)
    # Started in one kernel and ended in another: one collective, beside other work.
    assert (hidden.count, hidden.bytes, hidden.hidden) == (1, 64, True)
    scatter, permute, crossing = by["reduce-scatter", 8], by["collective-permute", 2], by["all-reduce", 2]
    assert (scatter.bytes, permute.bytes, permute.hidden) == (8 * 2 * 128 * 4, 16, True)
    # Between slices the compiler leaves transfers of a device's part; one to the host is none.
    assert (crossing.count, crossing.bytes, crossing.slices) == (1, 4 * 128 * 4, True)
    assert [at for at in found.values() if at.slices] == [crossing] and len(by) == len(found) == 5


def test_the_dearest_branch_counts():
    text = """\
%small (x: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} fusion(%x), calls=%f, backend_config={"window_config":{"estimated_cycles":"10"}}
}

%large (x: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} fusion(%x), calls=%f, backend_config={"window_config":{"estimated_cycles":"70"}}
}

ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} conditional(%i, %x, %x), BRANCHES
}
"""
    for branches in ("branch_computations={%small, %large}", "true_computation=%large, false_computation=%small"):
        assert costs(Module.parse(text.replace("BRANCHES", branches))).cycles == 70


def test_text_of_something_else_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Module.parse("module @jit_step {}")


@pytest.mark.parametrize(
    "shape, size",
    [
        ("f32[4,16]{1,0:T(8,128)}", 256),
        ("bf16[3]", 6),
        ("(pred[8], u8[4], s32[])", 16),
        ("f8e4m3fn[16]", 16),
        ("s4[8]", 4),
    ],
)
def test_bytes_of_a_type(shape, size):
    assert array_bytes(shape) == size


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, y", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, y", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, z", [[0, 1], [1, 0]]),
        ("dimensions={0}", []),
    ],
)
def test_groups_of_a_collective(text, expected):
    assert groups(text) == expected


def test_seconds_on_the_links():
    """One gigabyte among four devices of a v5p: (n - 1) / n of it over 180 GB/s, an all-reduce there and back."""
    chip = CHIPS["v5p"]
    seconds = lambda kind, slices=False, axes=1: wire_seconds(Collective(kind, 4, slices, False, 1, 1e9), chip, axes)
    assert seconds("all-gather") == pytest.approx(0.75 / 180)
    assert seconds("all-reduce") == 2 * seconds("reduce-scatter") == pytest.approx(1.5 / 180)
    assert seconds("all-gather", axes=3) == pytest.approx(0.25 / 180)
    assert seconds("all-to-all") == pytest.approx(0.75 / 180 / 4)
    assert seconds("collective-permute") == pytest.approx(2 / 180)  # one link, one way
    assert seconds("all-reduce", slices=True) == pytest.approx(1 / chip.dcn_gbps)


def test_the_stage_of_a_kernel():
    assert scope_of("jit(step)/transpose(jvp(loss))/student/while/body/checkpoint/mlp/dot") == "student/mlp"
    assert scope_of("jit(step)/jvp(update)/add") == "update" and scope_of("") == "other"
