"""The rules of a configuration: ranges of its numbers, and what has to fit together."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dreamer4_jax.errors import ConfigError

if TYPE_CHECKING:
    from dreamer4_jax.config import Config, PhaseConfig, TransformerConfig

PERCEPTUAL_NETWORKS = ("lpips-hed", "efficientnet-lite0")  # whose weights packages carry
PERCEPTUAL_FILES = (".safetensors", ".npz")


def _require(ok: bool, name: str, value: Any, hint: str) -> None:
    if not ok:
        raise ConfigError(f"{name} = {value!r}: {hint}")


# What each number may be, by the name of its field (a name means the same in every group). Checked before the rules
# between fields, some of which divide by these.
_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "layers width heads kv_heads head_dim ffn window height patch latents channels pack size agent_tokens k_max"
        " task_words task_vocab hidden head_layers bins horizon context sample_steps tile max_steps frames chunk"
        " chunks_per_shard burst_length readers steps batch length long_every log_every save_every episodes envs clips",
        lambda v: v >= 1,
        "must be at least 1",
    ),
    (
        "time_every local_shift registers mtp workers long_length warmup perceptual_frames",
        lambda v: v >= 0,
        "must be at least 0",
    ),
    ("seed", lambda v: 0 <= v < 2**32, "must be in [0, 2^32): JAX's keys take no more"),
    (
        "softcap local_space local_time beta dynamics_weight weight_decay",
        lambda v: 0 <= v < math.inf,
        "must be at least 0, and finite",
    ),
    (
        "rope_base_time rope_base_space lr clip event_weight reward_scale ppo_clip awr_temperature perceptual_weight",
        lambda v: 0 < v < math.inf,
        "must be above 0, and finite",
    ),
    (
        "lam alpha relevant_fraction input_floor labelled bot noisy_bot burst image_fraction decay",
        lambda v: 0 <= v <= 1,
        "must be in [0, 1]",
    ),
    ("gamma bc_share", lambda v: 0 < v <= 1, "must be in (0, 1]"),
    ("mask_max context_signal ema", lambda v: 0 <= v < 1, "must be in [0, 1)"),
    ("bootstrap_fraction holdout", lambda v: 0 < v < 1, "must be between 0 and 1"),
)
_RANGE_OF = {name: (ok, hint) for names, ok, hint in _RANGES for name in names.split()}


def _check_ranges(node: Any, at: str) -> None:
    """Checks every number of a group and of the groups in it; fields of other types have their own rules."""
    for f in dataclasses.fields(node):
        value, name = getattr(node, f.name), f"{at}.{f.name}".lstrip(".")
        if dataclasses.is_dataclass(value):
            _check_ranges(value, name)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    _check_ranges(item, f"{name}[{i}]")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            ok, hint = _RANGE_OF[f.name]
            _require(ok(value), name, value, hint)


def _validate_transformer(c: "TransformerConfig", at: str) -> None:
    _require(
        c.layers % c.period == 0,
        f"{at}.layers",
        c.layers,
        f"must be a multiple of {at}.time_every = {c.time_every}",
    )
    _require(
        c.heads % c.kv_heads == 0,
        f"{at}.heads",
        c.heads,
        f"must be a multiple of {at}.kv_heads = {c.kv_heads}",
    )
    _require(c.head_dim % 4 == 0, f"{at}.head_dim", c.head_dim, "must be a multiple of 4 (two RoPE axes of pairs)")
    _require(
        c.time_factorised or c.head_dim % 8 == 0,
        f"{at}.head_dim",
        c.head_dim,
        f"must be a multiple of 8 where {at}.time_factorised is off (half of a head turns with time, half with space)",
    )


def validate(c: "Config") -> None:
    """Raises `ConfigError` for a configuration that cannot work."""
    _check_ranges(c, "")
    t, d, a = c.tokenizer, c.dynamics, c.agent
    for at, sub in (
        ("tokenizer.encoder", t.encoder),
        ("tokenizer.decoder", t.decoder),
        ("dynamics.transformer", d.transformer),
    ):
        _validate_transformer(sub, at)
    for name, value in (("height", t.height), ("width", t.width)):
        _require(value % t.patch == 0, f"tokenizer.{name}", value, f"must be a multiple of tokenizer.patch = {t.patch}")
    _require(
        t.latents % t.pack == 0, "tokenizer.latents", t.latents, f"must be a multiple of tokenizer.pack = {t.pack}"
    )
    if t.latent_grid:
        _require(
            t.latents == t.patches,
            "tokenizer.latents",
            t.latents,
            f"must equal the number of patches, {t.patches}, while tokenizer.latent_grid is on",
        )
        _require(
            all(g % b == 0 for g, b in zip(t.grid, t.pack_block, strict=True)),
            "tokenizer.pack",
            t.pack,
            f"its {t.pack_block} blocks of latents must tile the {t.grid} grid of patches",
        )
    _require(
        t.perceptual in ("none", *PERCEPTUAL_NETWORKS) or t.perceptual.endswith(PERCEPTUAL_FILES),
        "tokenizer.perceptual",
        t.perceptual,
        f"choose one of none, {', '.join(PERCEPTUAL_NETWORKS)}, or a file {' or '.join(PERCEPTUAL_FILES)}",
    )
    _require(
        t.encoder.width == t.decoder.width,
        "tokenizer.decoder.width",
        t.decoder.width,
        f"must equal tokenizer.encoder.width = {t.encoder.width}",
    )
    _require(
        d.k_max >= 2 and d.k_max & (d.k_max - 1) == 0, "dynamics.k_max", d.k_max, "must be a power of two, at least 2"
    )
    _require(
        d.transformer.width % 2 == 0,
        "dynamics.transformer.width",
        d.transformer.width,
        "must be even: the (tau, d) token concatenates two half-width tables",
    )
    _require(
        a.sample_steps & (a.sample_steps - 1) == 0 and a.sample_steps <= d.k_max,
        "agent.sample_steps",
        a.sample_steps,
        f"must be a power of two up to dynamics.k_max = {d.k_max}",
    )
    _require(a.bins >= 3 and a.bins % 2 == 1, "agent.bins", a.bins, "must be odd and at least 3: one bin stands at 0")
    if c.env.kind != "none":
        _require(len(c.env.levels) > 0, "env.levels", c.env.levels, "needs at least one level")
    _require(len(c.actions) > 0, "actions", c.actions, "needs at least one component")
    names = [part.name for part in c.actions]
    _require(len(set(names)) == len(names), "actions", names, "each component needs a name of its own")
    for i, part in enumerate(c.actions):
        _require(
            part.kind != "mouse" or part.size == 121, f"actions[{i}].size", part.size, "is 121 (11 x 11) for a mouse"
        )
    for phase_field in dataclasses.fields(c.train):
        name = phase_field.name
        p: PhaseConfig = getattr(c.train, name)
        at = f"train.{name}"
        longest = max(p.length, p.long_length)
        _require(
            longest <= c.data.chunk,
            f"{at}.{'long_' if p.long_length > p.length else ''}length",
            longest,
            f"must not exceed data.chunk = {c.data.chunk} frames",
        )
        _require(
            name == "dynamics" or p.image_fraction == 0,
            f"{at}.image_fraction",
            p.image_fraction,
            "must be 0: only phase 1b treats rows as separate images",
        )
    _require(
        a.context + 1 <= c.data.chunk,
        "agent.context",
        a.context,
        f"must be below data.chunk = {c.data.chunk} frames",
    )
    uniform = c.train.agent.batch * (1 - a.relevant_fraction)
    _require(
        uniform >= 1 and abs(uniform - round(uniform)) < 1e-6,
        "agent.relevant_fraction",
        a.relevant_fraction,
        f"of train.agent.batch = {c.train.agent.batch} rows: must leave a whole number of uniform rows, at least one",
    )
    if d.objective == "shortcut" and d.mix == "rows":
        for at, share in (("dynamics", 1.0), ("agent", 1.0 - a.relevant_fraction)):
            p = getattr(c.train, at)
            # Long batches have fewer rows, so that a step costs about the same.
            rows = min(p.rows)
            _require(
                math.floor(rows * share + 1e-6) >= 2,
                f"train.{at}.batch",
                p.batch,
                f"leaves fewer than two rows with dynamics loss in a batch of {rows} rows, one for each branch of "
                "dynamics.mix = 'rows': use more rows, shorter long batches, or 'frames'",
            )
    _require(
        d.transformer.time_every >= 1,
        "dynamics.transformer.time_every",
        d.transformer.time_every,
        "must be at least 1: without time layers the dynamics has no memory",
    )
    _require(
        c.train.imagination.length >= a.context,
        "train.imagination.length",
        c.train.imagination.length,
        f"must hold a context of agent.context = {a.context} frames",
    )
    parts = 1 + len(c.data.also)
    _require(
        not c.data.weights or (len(c.data.weights) == parts and all(0 < w < math.inf for w in c.data.weights)),
        "data.weights",
        c.data.weights,
        f"must be {parts} numbers above 0, one for the first dataset and one for each of data.also",
    )
    _require(
        c.data.bot + c.data.noisy_bot <= 1.0 + 1e-9,
        "data.noisy_bot",
        c.data.noisy_bot,
        f"with data.bot = {c.data.bot} the shares exceed 1",
    )
    _require(
        c.evaluate.context + c.evaluate.frames <= c.data.chunk,
        "evaluate.frames",
        c.evaluate.frames,
        f"evaluate.context + evaluate.frames must not exceed data.chunk = {c.data.chunk}",
    )
