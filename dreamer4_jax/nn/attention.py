"""Attention behind one surface: ``attention(q, k, v, mask, *, softcap, impl)``.

A mask is a small description (`Mask`), made dense only over the few rows and columns of one space or time attention.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dreamer4_jax.parallel.sharding import platform

Impl = Literal["auto", "reference", "xla"]
EXP_LIMIT = 60.0  # a sum of a million exp(60) is still a float32, and exp(-60) too


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_pos", "k_pos", "q_seg", "k_seg"],
    meta_fields=["window", "types", "rules", "k_types"],
)
@dataclass(frozen=True)
class Mask:
    """Who may attend to whom. Conditions left at None do not apply.

    Attributes:
      q_pos, k_pos: int32 [..., L] and [..., S], frame indices: a row sees columns of its own and earlier frames.
        A negative column index is an empty cache slot that nobody sees.
      window: a row sees the last `window` frames, its own included.
      q_seg, k_seg: int32, a row sees columns of its own segment (episode) only.
      types: token types of both sides. rules[a][b]: may type a attend to type b.
      k_types: token types of the columns, where they are not the rows'.
    """

    q_pos: Int[Array, "... L"] | None = None
    k_pos: Int[Array, "... S"] | None = None
    q_seg: Int[Array, "... L"] | None = None
    k_seg: Int[Array, "... S"] | None = None
    window: int | None = None
    types: tuple[int, ...] | None = None
    rules: tuple[tuple[bool, ...], ...] | None = None
    k_types: tuple[int, ...] | None = None

    def dense(self) -> Bool[Array, "... L S"] | None:
        """The boolean mask, or None if everything is allowed."""
        terms = []
        if self.q_pos is not None and self.k_pos is not None:
            q, k = self.q_pos[..., :, None], self.k_pos[..., None, :]
            terms += [k >= 0, k <= q]
            if self.window is not None:
                terms.append(k > q - self.window)
        if self.q_seg is not None and self.k_seg is not None:
            terms.append(self.q_seg[..., :, None] == self.k_seg[..., None, :])
        if self.types is not None and self.rules is not None:
            allowed = np.array(self.rules, bool)[np.ix_(self.types, self.k_types or self.types)]
            if not allowed.all():
                terms.append(jnp.asarray(allowed))
        if not terms:
            return None
        out = terms[0]
        for term in terms[1:]:
            out = out & term
        return out


def _scores(q: Array, k: Array) -> Array:
    """q [..., G, R, L, K], k [..., G, S, K] -> float32 [..., G, R, L, S]."""
    *lead, r, length, dim = q.shape
    # Rows of all heads of a group in one matrix product.
    out = jnp.einsum("...lk,...sk->...ls", q.reshape(*lead, r * length, dim), k, preferred_element_type=jnp.float32)
    return out.reshape(*lead, r, length, k.shape[-2])


def _mix(p: Array, v: Array) -> Array:
    """p [..., G, R, L, S], v [..., G, S, K] -> [..., G, R, L, K]."""
    *lead, r, length, s = p.shape
    out = jnp.einsum("...ls,...sk->...lk", p.reshape(*lead, r * length, s), v)
    return out.reshape(*lead, r, length, v.shape[-1])


@jax.custom_jvp
def _ratio(a: Array, b: Array) -> Array:
    """``a / b``, whose derivative squares nothing: sums of exp reach from exp(-60) to exp(60) and beyond."""
    return a / b


@_ratio.defjvp
def _ratio_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    out = _ratio(a, b)
    return out, (da - out * db) / b


def _reference(q, ks, vs, masks, biases, softcap):
    *lead, heads, length, dim = q.shape
    groups = ks[0].shape[-3]
    q = q.reshape(*lead, groups, heads // groups, length, dim)
    q = q * jnp.asarray(dim**-0.5, q.dtype)
    scores = []
    for k, mask, bias in zip(ks, masks, biases, strict=True):
        s = _scores(q, k)
        if bias is not None:
            s = s + bias.reshape(*bias.shape[:-3], groups, heads // groups, *bias.shape[-2:])
        if softcap:
            s = softcap * jnp.tanh(s / softcap)
        dense = None if mask is None else mask.dense()
        if dense is not None:
            s = jnp.where(dense[..., None, None, :, :], s, jnp.finfo(jnp.float32).min)
        scores.append(s)
    # One softmax over all sources without building their concatenation of keys and values. Under a soft cap exp cannot
    # overflow, so no row needs its maximum first: the float32 logits are read once, where a softmax reads them thrice.
    top = 0.0
    if not softcap or softcap > EXP_LIMIT:
        top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in scores)))
    weights = [jnp.exp(s - top) for s in scores]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    mixed = sum(_mix(w.astype(v.dtype), v).astype(jnp.float32) for w, v in zip(weights, vs, strict=True))
    return _ratio(mixed, total).astype(vs[0].dtype).reshape(*lead, heads, length, dim)


def attention(
    q: Float[Array, "... L H K"],
    k: Float[Array, "... S G K"] | Sequence[Array],
    v: Float[Array, "... S G K"] | Sequence[Array],
    mask: Mask | None | Sequence[Mask | None] = None,
    bias: Float[Array, "... H L S"] | None | Sequence[Array | None] = None,
    *,
    softcap: float | None = None,
    impl: Impl = "auto",
    heads_first: bool = False,
) -> Float[Array, "... L H K"]:
    """Grouped-query attention, softmax in float32; a soft cap turns a logit s into ``softcap * tanh(s / softcap)``.

    `k`, `v`, `mask` and `bias` may be sequences of equal length: one softmax over several sources (ring cache, new
    frames).

    Args:
      bias: float32, added to ``q k / sqrt(K)`` before the soft cap.
      impl: "reference" is einsums on any backend; "xla" is `jax.nn.dot_product_attention` (one source, no soft cap);
        "auto" takes "xla" where it applies on a GPU or TPU.
      heads_first: q [..., H, L, K], k and v [..., G, S, K], and so the result: the order in which they are multiplied.
    """
    ks = list(k) if isinstance(k, Sequence) else [k]
    vs = list(v) if isinstance(v, Sequence) else [v]
    masks = list(mask) if isinstance(mask, Sequence) else [mask]
    biases = list(bias) if isinstance(bias, Sequence) else [bias] * len(ks)  # one bias fits one source, None any number
    one = len(ks) == 1 and not softcap
    if impl == "xla" and not one:
        raise ValueError("attention(impl='xla') takes one source and no softcap; use impl='reference'")
    if impl == "auto":
        impl = "xla" if one and platform() != "cpu" else "reference"
    if heads_first == (impl == "xla"):  # each path has its own order
        q, *rest = (jnp.swapaxes(x, -3, -2) for x in (q, *ks, *vs))
        ks, vs = rest[: len(ks)], rest[len(ks) :]
    if impl == "reference":
        out = _reference(q, ks, vs, masks, biases, softcap)
        return out if heads_first else jnp.swapaxes(out, -3, -2)
    *lead, length, heads, dim = q.shape
    dense = None if masks[0] is None else masks[0].dense()
    if dense is not None:
        dense = jnp.broadcast_to(dense, (*lead, *dense.shape[-2:])).reshape(-1, 1, *dense.shape[-2:])
    if biases[0] is not None:
        full = jnp.broadcast_to(biases[0], (*lead, *biases[0].shape[-3:]))
        biases[0] = full.reshape(-1, *full.shape[-3:])
    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[-3:]) for x in (q, ks[0], vs[0]))
    out = jax.nn.dot_product_attention(flat_q, flat_k, flat_v, bias=biases[0], mask=dense).reshape(q.shape)
    return jnp.swapaxes(out, -3, -2) if heads_first else out
