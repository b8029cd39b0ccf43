"""Keys of every kind of action space, and the actions that held keys make."""

import numpy as np
import pytest

from dreamer4_jax.agent.actions import mu_law_mouse
from dreamer4_jax.config import ActionComponent, preset
from dreamer4_jax.play.controls import controls

PAGE_KEYS = {"Space", "Period", "Backspace", "KeyR", "KeyP", "KeyM", "KeyN", "BracketLeft", "BracketRight"}


def of(*parts: ActionComponent):
    return controls(preset("tiny", actions=parts))


def held(c, *labels: str) -> dict[str, np.ndarray]:
    return c.compose([[b.label for b in c.bindings].index(label) for label in labels])


def test_babyai_has_keys_by_name_and_rests_on_wait():
    c = controls(preset("tiny"))
    assert [b.label for b in c.bindings] == ["turn left", "turn right", "forward", "pick up", "drop", "open", "wait"]
    assert int(held(c)["move"]) == 6 and c.describe(held(c)) == "wait"
    assert int(held(c, "forward")["move"]) == 2
    assert int(held(c, "forward", "turn left")["move"]) == 0  # the last pressed wins
    assert "ArrowUp" in c.to_json()[2]["keys"]


def test_binary_keys_combine():
    c = of(ActionComponent("keys", "binary", 3), ActionComponent("move", "categorical", 2))
    action = held(c, "keys 0", "keys 2", "move 1")
    np.testing.assert_array_equal(action["keys"], np.array([1, 0, 1], np.uint8))
    assert action["keys"].dtype == np.uint8 and int(action["move"]) == 1
    np.testing.assert_array_equal(held(c)["keys"], np.zeros(3, np.uint8))


def test_the_mouse_moves_by_arrows_in_its_own_classes():
    c = of(ActionComponent("mouse", "mouse", 121))
    assert [b.keys for b in c.bindings] == [("ArrowLeft",), ("ArrowRight",), ("ArrowUp",), ("ArrowDown",)]
    assert int(held(c)["mouse"]) == mu_law_mouse.encode(0.0, 0.0)
    dx, dy = mu_law_mouse.decode(int(held(c, "look right", "look up")["mouse"]))
    assert dx > 0 > dy


def test_continuous_dimensions_go_both_ways():
    c = of(ActionComponent("force", "continuous", 2))
    np.testing.assert_array_equal(held(c, "force 0 −", "force 1 +")["force"], np.array([-1.0, 1.0], np.float32))
    assert held(c)["force"].dtype == np.float32
    assert [b.keys for b in c.bindings] == [("ArrowLeft",), ("ArrowRight",), ("ArrowDown",), ("ArrowUp",)]  # a joystick


@pytest.mark.parametrize("kind", ["categorical", "binary", "continuous"])
def test_no_key_has_two_meanings(kind):
    for c in (of(ActionComponent("x", kind, 20), ActionComponent("mouse", "mouse", 121)), controls(preset("tiny"))):
        keys = [key for b in c.bindings for key in b.keys]
        assert len(keys) == len(set(keys)) and not PAGE_KEYS & set(keys)
