"""Action spaces and their distributions: categorical, binary keys, mu-law mouse, continuous.

An action is a dict from component name to an array; a component that is missing for a frame has ``present`` False.
Everything here is float32 and a pytree: leading axes may be batch, time and multi-token offsets in any number.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dreamer4_jax.config import ActionComponent, ConfigError, UserError

MOUSE_CLASSES = 121
STD_RANGE = (0.05, 1.0)  # of a continuous action; the floor keeps the density, and with it PMPO's gradient, bounded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Categorical:
    """One of A classes. Values are int32 [...]; a class outside [0, A) has log-probability NaN, never a silent 0."""

    logits: Float[Array, "... A"]

    def log_prob(self, value: Int[Array, "..."]) -> Float[Array, "..."]:
        value, classes = jnp.asarray(value, jnp.int32), self.logits.shape[-1]
        hit = value[..., None] == jnp.arange(classes)  # a comparison, not a gather: it broadcasts and shards
        logp = jnp.sum(jnp.where(hit, jax.nn.log_softmax(self.logits), 0.0), axis=-1)
        return jnp.where((value >= 0) & (value < classes), logp, jnp.nan)

    def sample(self, key: Array) -> Int[Array, "..."]:
        return jax.random.categorical(key, self.logits).astype(jnp.int32)

    def mode(self) -> Int[Array, "..."]:
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def kl(self, other: Self) -> Float[Array, "..."]:
        logp, logq = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)

    def entropy(self) -> Float[Array, "..."]:
        logp = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    def intention(self) -> Float[Array, "... A"]:
        """Probability of each class."""
        return jax.nn.softmax(self.logits)

    def agreement(self, value: Int[Array, "..."]) -> Float[Array, "..."]:
        """1 where the mode is `value`."""
        return (self.mode() == value).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Binary:
    """A independent keys. Values are uint8 (0 or 1) [..., A]."""

    logits: Float[Array, "... A"]

    def log_prob(self, value: Array) -> Float[Array, "..."]:
        value = jnp.asarray(value, jnp.float32)
        pressed, released = jax.nn.log_sigmoid(self.logits), jax.nn.log_sigmoid(-self.logits)
        return jnp.sum(value * pressed + (1.0 - value) * released, axis=-1)

    def sample(self, key: Array) -> Array:
        return jax.random.bernoulli(key, jax.nn.sigmoid(self.logits)).astype(jnp.uint8)

    def mode(self) -> Array:
        return (self.logits > 0).astype(jnp.uint8)

    def kl(self, other: Self) -> Float[Array, "..."]:
        on, off = jax.nn.log_sigmoid(self.logits), jax.nn.log_sigmoid(-self.logits)
        other_on, other_off = jax.nn.log_sigmoid(other.logits), jax.nn.log_sigmoid(-other.logits)
        return jnp.sum(jnp.exp(on) * (on - other_on) + jnp.exp(off) * (off - other_off), axis=-1)

    def entropy(self) -> Float[Array, "..."]:
        on, off = jax.nn.log_sigmoid(self.logits), jax.nn.log_sigmoid(-self.logits)
        return -jnp.sum(jnp.exp(on) * on + jnp.exp(off) * off, axis=-1)

    def intention(self) -> Float[Array, "... A"]:
        """Probability that each key is pressed."""
        return jax.nn.sigmoid(self.logits)

    def agreement(self, value: Array) -> Float[Array, "..."]:
        """Share of the keys whose mode is `value`."""
        return jnp.mean((self.mode() == (jnp.asarray(value) > 0)).astype(jnp.float32), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Continuous:
    """Diagonal normal over A dimensions whose data lie in [-1, 1]. Values are float32 [..., A].

    The mean is squashed by tanh and the standard deviation lies within `STD_RANGE`. Samples are not clipped: their
    log-probability stays exact, and what acts on them (environment adapter) clips.
    """

    mean: Float[Array, "... A"]
    log_std: Float[Array, "... A"]

    @classmethod
    def from_outputs(cls, outputs: Float[Array, "... 2*A"]) -> Self:
        mean, raw = jnp.split(outputs, 2, axis=-1)
        low, high = np.log(STD_RANGE)
        return cls(jnp.tanh(mean), low + (high - low) * jax.nn.sigmoid(raw))

    def log_prob(self, value: Array) -> Float[Array, "..."]:
        z = (jnp.asarray(value, jnp.float32) - self.mean) * jnp.exp(-self.log_std)
        return jnp.sum(-0.5 * z * z - self.log_std - 0.5 * np.log(2 * np.pi), axis=-1)

    def sample(self, key: Array) -> Array:
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape, jnp.float32)

    def mode(self) -> Array:
        return self.mean

    def kl(self, other: Self) -> Float[Array, "..."]:
        ratio = jnp.exp(2.0 * (self.log_std - other.log_std))
        shift = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return jnp.sum(other.log_std - self.log_std + 0.5 * (ratio + shift * shift - 1.0), axis=-1)

    def entropy(self) -> Float[Array, "..."]:
        return jnp.sum(self.log_std + 0.5 * np.log(2 * np.pi * np.e), axis=-1)

    def intention(self) -> Float[Array, "... A"]:
        """The mean."""
        return self.mean

    def agreement(self, value: Array) -> Float[Array, "..."]:
        """1 minus half the mean absolute error of the mode: 1 is exact, 0 the opposite end of [-1, 1]."""
        return 1.0 - 0.5 * jnp.mean(jnp.abs(self.mean - value), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActionDistribution:
    """Independent distributions of the components of an action, all with the same leading axes."""

    parts: dict[str, Any]  # name -> Categorical | Binary | Continuous

    def _check(self, names: Mapping[str, Any], what: str) -> None:
        if set(names) != set(self.parts):
            raise UserError(f"{what} = {sorted(names)}: the policy has the components {sorted(self.parts)}")

    def log_probs(self, values: Mapping[str, Array]) -> dict[str, Float[Array, "..."]]:
        """Log-probability of each component's value."""
        self._check(values, "action values")
        return {name: part.log_prob(values[name]) for name, part in self.parts.items()}

    def log_prob(
        self, values: Mapping[str, Array], present: Mapping[str, Bool[Array, "..."]] | None = None
    ) -> Float[Array, "..."]:
        """Log-probability of an action: the sum over components; one that is not `present` adds exactly 0."""
        if present is None:
            return _total(self.log_probs(values))
        self._check(present, "action masks")
        # Whatever stands in for a missing value (a NaN, say) must not reach the gradient either.
        terms = self.log_probs({name: _keep(present[name], jnp.asarray(v)) for name, v in values.items()})
        return _total({name: jnp.where(present[name], term, 0.0) for name, term in terms.items()})

    def sample(self, key: Array) -> dict[str, Array]:
        """One action. The keys follow the sorted names, so that passing through jit (which sorts) changes nothing."""
        names = sorted(self.parts)
        keys = jax.random.split(key, len(names))
        return {name: self.parts[name].sample(k) for name, k in zip(names, keys, strict=True)}

    def mode(self) -> dict[str, Array]:
        """The most probable action."""
        return {name: part.mode() for name, part in self.parts.items()}

    def intention(self) -> dict[str, Float[Array, "... A"]]:
        """What a person is shown of it: probabilities of classes and keys, means of continuous components."""
        return {name: part.intention() for name, part in self.parts.items()}

    def kl(self, other: "ActionDistribution") -> Float[Array, "..."]:
        """KL(self || other), summed over components."""
        self._check(other.parts, "components of the other distribution")
        return _total({name: part.kl(other.parts[name]) for name, part in self.parts.items()})

    def entropy(self) -> Float[Array, "..."]:
        """Entropy (differential for continuous components), summed over components."""
        return _total({name: part.entropy() for name, part in self.parts.items()})

    def agreement(self, values: Mapping[str, Array]) -> dict[str, Float[Array, "..."]]:
        """How well the mode meets the values, per component, 1 at best (a metric: see the components)."""
        self._check(values, "action values")
        return {name: part.agreement(values[name]) for name, part in self.parts.items()}


def _keep(present: Bool[Array, "..."], value: Array) -> Array:
    mask = jnp.asarray(present)
    return jnp.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), value, jnp.zeros_like(value))


def _total(terms: Mapping[str, Array]) -> Array:
    return sum((terms[name] for name in sorted(terms)), start=jnp.float32(0.0))


def _outputs(component: ActionComponent) -> int:
    match component.kind:
        case "categorical" | "binary":
            return component.size
        case "mouse":
            return MOUSE_CLASSES
        case "continuous":
            return 2 * component.size
    raise ConfigError(f"actions.kind = {component.kind!r}: must be categorical, binary, continuous or mouse")


def logits_size(components: Sequence[ActionComponent]) -> int:
    """Network outputs that describe one action."""
    return sum(_outputs(c) for c in components)


def distribution(outputs: Float[Array, "... O"], components: Sequence[ActionComponent]) -> ActionDistribution:
    """Splits `outputs` [..., logits_size(components)], in the order of the components, into their distributions."""
    names = [c.name for c in components]
    if len(set(names)) != len(names):
        raise ConfigError(f"actions.name = {names}: every component needs a name of its own")
    if outputs.shape[-1] != logits_size(components):
        raise ConfigError(
            f"policy outputs = {outputs.shape[-1]}: the action components {names} need {logits_size(components)}"
        )
    outputs = outputs.astype(jnp.float32)
    parts: dict[str, Any] = {}
    start = 0
    for component in components:
        piece = outputs[..., start : start + _outputs(component)]
        start += _outputs(component)
        match component.kind:
            case "binary":
                parts[component.name] = Binary(piece)
            case "continuous":
                parts[component.name] = Continuous.from_outputs(piece)
            case _:
                parts[component.name] = Categorical(piece)
    return ActionDistribution(parts)


@dataclasses.dataclass(frozen=True)
class MuLawMouse:
    """Foveated mouse classes of VPT: 11 mu-law bins of the angle per axis, ``id = 11 * bin(dy) + bin(dx)``.

    Angles in degrees, clipped to +-`limit`. NumPy in, NumPy out (float64); JAX in, JAX out (float32).
    """

    limit: float = 10.0
    bin: float = 2.0
    mu: float = 10.0

    @property
    def bins(self) -> int:
        return 2 * round(self.limit / self.bin) + 1

    def encode(self, dx: Any, dy: Any) -> Any:
        """Mouse movement (dx, dy) [...] -> class int32 [...] in [0, 121)."""
        jax_in = isinstance(dx, jax.Array) or isinstance(dy, jax.Array)
        xp: Any = jnp if jax_in else np
        return (self.bins * self._bin(xp, dy) + self._bin(xp, dx)).astype(xp.int32)

    def decode(self, index: Any) -> tuple[Any, Any]:
        """Class [...] in [0, 121) -> the centres (dx, dy) [...] of its bins."""
        xp: Any = jnp if isinstance(index, jax.Array) else np
        index = xp.asarray(index)
        return self._centre(xp, index % self.bins), self._centre(xp, index // self.bins)

    def _bin(self, xp: Any, angle: Any) -> Any:
        x = xp.clip(xp.asarray(angle, xp.float32 if xp is jnp else xp.float64) / self.limit, -1.0, 1.0)
        foveated = xp.sign(x) * xp.log1p(self.mu * xp.abs(x)) / np.log1p(self.mu) * self.limit
        return xp.round((foveated + self.limit) / self.bin).astype(xp.int32)

    def _centre(self, xp: Any, index: Any) -> Any:
        x = (index * self.bin - self.limit) / self.limit
        return xp.sign(x) * xp.expm1(xp.abs(x) * np.log1p(self.mu)) / self.mu * self.limit


mu_law_mouse = MuLawMouse()
