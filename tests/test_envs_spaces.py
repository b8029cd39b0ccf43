"""Actions by component and as environments take them: the same action, in the space that the environment shows."""

import numpy as np
import pytest

from dreamer4_jax.config import ActionComponent, UserError
from dreamer4_jax.envs import spaces

PARTS = (
    ActionComponent("move", "categorical", 4),
    ActionComponent("keys", "binary", 3),
    ActionComponent("look", "mouse", 121),
    ActionComponent("arm", "continuous", 2),
)


@pytest.mark.parametrize("parts", [PARTS, *[(part,) for part in PARTS]], ids=lambda p: "+".join(c.kind for c in p))
def test_there_and_back(parts):
    space = spaces.action_space(parts)
    space.seed(0)
    for _ in range(5):
        given = space.sample()
        action = spaces.from_env(given, parts)
        assert set(action) == {part.name for part in parts}
        back = spaces.to_env(action)
        assert space.contains(back if len(parts) == 1 else {k: v if v.ndim else int(v) for k, v in back.items()})
        again = spaces.from_env(back, parts)
        for part in parts:
            like = spaces.nothing(parts, 1)[part.name][0]
            assert action[part.name].dtype == again[part.name].dtype == like.dtype
            np.testing.assert_array_equal(action[part.name], again[part.name])


def test_a_single_class_is_an_int_and_a_batch_an_array():
    assert spaces.to_env({"move": np.asarray(3, np.int32)}) == 3
    assert isinstance(spaces.to_env({"move": np.asarray(3, np.int32)}), int)
    np.testing.assert_array_equal(spaces.to_env({"move": np.arange(3)}), [0, 1, 2])


def test_an_action_of_another_shape_is_named():
    with pytest.raises(UserError, match=r"'arm' has shape \[3\]: a continuous component of size 2 takes \[2\]"):
        spaces.from_env(np.zeros(3), (PARTS[3],))


def test_components_are_compared_and_described():
    one = (ActionComponent("torque", "continuous", 1),)
    assert spaces.same(one, (ActionComponent("action", "continuous", 1),))
    assert not spaces.same(one, (ActionComponent("torque", "binary", 1),))
    assert spaces.same(PARTS, PARTS[::-1]) and not spaces.same(PARTS[:2], PARTS[2:])
    assert spaces.describe(one) == "one continuous component of size 1"
    assert spaces.describe(PARTS[:2]) == "two components: 'move' (categorical, size 4), 'keys' (binary, size 3)"
