"""Configuration: nested frozen dataclasses, presets, dotted overrides and their checks.

Every field is read by the code; a value that cannot work raises `ConfigError` naming the field, the value and what
would be right, before anything is compiled or written.
"""

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from dreamer4_jax.errors import ConfigError as ConfigError
from dreamer4_jax.errors import UserError as UserError
from dreamer4_jax.validation import validate


@dataclass(frozen=True)
class TransformerConfig:
    """The efficient transformer (paper 3.4): space, space, space, causal time."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    ffn: int = 344
    time_every: int = 4  # the last layer of each period of this many is a time layer; 0: space layers only
    # False: a time layer attends over all tokens of all frames in its window; in every layer that is dense attention.
    time_factorised: bool = True
    window: int = 16  # frames a time layer sees, its own included
    softcap: float = 50.0  # 0: off
    qk_norm: bool = True
    rope_base_time: float = 10_000.0
    rope_base_space: float = 10.0
    # Constant query/key biases make attention start local: among the places of a frame, and at recent frames. 0: off.
    local_space: float = 0.0
    local_time: float = 0.0
    local_shift: int = 0  # how far from a token its heads look at first: 1 is its neighbours, in space by turns
    remat: Literal["none", "full", "dots"] = "none"
    scan: bool = True  # scan over periods (one period compiled once); False unrolls them
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def period(self) -> int:
        """Layers of one period, the unit that is scanned."""
        return self.time_every or 1

    @property
    def time_layers(self) -> int:
        return self.layers // self.time_every if self.time_every else 0


@dataclass(frozen=True)
class TokenizerConfig:
    """Causal masked autoencoder (paper 3.1)."""

    height: int = 64
    width: int = 64
    patch: int = 8
    latents: int = 64
    channels: int = 8
    latent_grid: bool = True  # latents share the patches' 2-D positions (wants as many latents as patches)
    pack: int = 4  # adjacent latents merged into one spatial token of the dynamics
    mask_max: float = 0.9  # p ~ U(0, mask_max) per image
    # The second term of Eq 5: none, lpips-hed, efficientnet-lite0, or a file of LPIPS-VGG weights (docs/perceptual.md).
    perceptual: str = "none"
    perceptual_weight: float = 0.2  # of the normalised term
    perceptual_frames: int = 0  # frames of each row that it compares, drawn at each step; 0: all
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=TransformerConfig)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns) of a frame."""
        return self.height // self.patch, self.width // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def pack_block(self) -> tuple[int, int]:
        """Rows and columns of latents merged into one token: near square on a grid, adjacent pairs otherwise."""
        rows = max(r for r in range(1, int(self.pack**0.5) + 1) if self.pack % r == 0) if self.latent_grid else 1
        return rows, self.pack // rows

    @property
    def tokens(self) -> int:
        """Spatial tokens of a frame as the dynamics sees them (N_z)."""
        return self.latents // self.pack

    @property
    def token_channels(self) -> int:
        return self.channels * self.pack


@dataclass(frozen=True)
class ActionComponent:
    """One part of an action. `size`: classes (categorical), keys (binary), dimensions (continuous); mouse is 121."""

    name: str = "move"
    kind: Literal["categorical", "binary", "continuous", "mouse"] = "categorical"
    size: int = 7


@dataclass(frozen=True)
class DynamicsConfig:
    """Interactive dynamics trained with shortcut forcing (paper 3.2)."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    registers: int = 4  # at least this many; more fill the frame's tokens up to a multiple of 8
    agent_tokens: int = 1
    k_max: int = 16
    objective: Literal["shortcut", "diffusion"] = "shortcut"  # diffusion: plain diffusion forcing, the baseline
    mix: Literal["rows", "frames"] = "rows"  # frames: literal Eq 4, d drawn per frame over the whole ladder
    bootstrap_fraction: float = 0.25  # share of rows on the bootstrap branch (mix = rows)
    teacher: Literal["ema", "online"] = "ema"
    ramp: Literal["both", "flow", "none"] = "both"
    prediction: Literal["x", "v"] = "x"  # what the network gives: clean tokens, or the velocity towards them
    loss_space: Literal["x", "v"] = "x"  # of the squared errors: clean tokens (paper Eq 7), or velocities (Eq 3)
    condition_spatial: bool = False  # also add the action's and the (tau, d) token to every spatial token
    input_floor: float = 1.0  # gain of noisy tokens at signal level 0, see `dynamics.input_gain`; 1: no gain
    context_signal: float = 0.9  # rounded down to the grid of 1/k_max


@dataclass(frozen=True)
class AgentConfig:
    """Task-conditioned policy, reward and continue heads (paper Eq 9) and imagination training (Eq 10, 11)."""

    task_words: int = 12  # words of a task text
    task_vocab: int = 64
    mtp: int = 8  # offsets n = 0 .. mtp
    hidden: int = 128
    head_layers: int = 1
    bins: int = 255
    gamma: float = 0.997
    lam: float = 0.95
    alpha: float = 0.5
    beta: float = 0.3
    # Of the policy in phase 3; pmpo is the paper's. none: the policy stays as cloned, and only the value is learned.
    objective: Literal["pmpo", "reinforce", "ppo", "awr", "filtered_bc", "none"] = "pmpo"
    reward_scale: float = 1.0  # of imagined rewards in phase 3; PMPO sees signs alone
    normalize_advantage: bool = False  # divide advantages by their root mean square over the batch
    ppo_clip: float = 0.2
    awr_temperature: float = 1.0
    bc_share: float = 0.25  # best share of the imagined rollouts, which filtered cloning imitates
    horizon: int = 16
    context: int = 8  # frames of dataset context in front of a rollout
    sample_steps: int = 4  # K during imagination
    relevant_fraction: float = 0.5
    dynamics_weight: float = 1.0  # of the normalised dynamics loss beside those of the heads (phase 2)
    event_weight: float = 1.0  # of rewards (not 0) and ends among the targets of their heads (phase 2); 1: the paper's


@dataclass(frozen=True)
class EnvConfig:
    """The real environment, and the scripted policies that record it."""

    kind: Literal["babyai", "frozenlake", "crafter", "atari", "minatar", "vizdoom", "control", "none"] = (
        "babyai"  # none: recorded data alone, see data.source
    )
    levels: tuple[str, ...] = ("BabyAI-GoToLocal-v0",)
    view: Literal["full", "agent"] = "full"  # whole grid, or the agent's 7 x 7 view
    tile: int = 8  # pixels of a grid tile
    max_steps: int = 32  # time limit of an episode


@dataclass(frozen=True)
class DataConfig:
    """Recording, storage and reading of episodes."""

    source: str = ""  # train on this instead of recording: a dataset, or anything that `dreamer4 data convert` reads
    frames: int = 60_000
    chunk: int = 64  # frames of one record
    chunks_per_shard: int = 64
    holdout: float = 0.05  # share of shards held out
    bot: float = 0.2  # share of episodes by the scripted expert alone
    noisy_bot: float = 0.5  # expert with bursts of random actions; the rest of the episodes is aimless
    burst: float = 0.25  # probability that a burst starts at a step
    burst_length: int = 3
    workers: int = 2
    readers: int = 1  # threads of each process that read batches ahead of the training
    also: tuple[str, ...] = ()  # further datasets, mixed in row by row
    weights: tuple[float, ...] = ()  # of the first dataset and of each of `also`; empty: every window once an epoch
    labelled: float = 1.0  # share of the training frames whose actions are known; the others count as unlabelled video
    labelled_levels: tuple[
        str, ...
    ] = ()  # the share is of the frames of these levels, and no other's actions are known


@dataclass(frozen=True)
class PhaseConfig:
    """One training phase."""

    steps: int = 1000
    batch: int = 16
    length: int = 16  # frames of a short batch (T1)
    long_length: int = 0  # frames of a long batch (T2); 0: no long batches
    long_every: int = 4  # every n-th batch is long
    image_fraction: float = 0.0  # share of rows treated as separate images, in phase 1b alone
    optimizer: Literal["adamw", "laprop", "muon"] = "adamw"
    lr: float = 1e-3
    warmup: int = 50
    decay: float = 0.2  # share of the steps over which the rate falls to 0 at the end (WSD)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    normalize_losses: bool = True  # divide each term by a running estimate of its root mean square
    log_every: int = 20
    save_every: int = 500

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of a short batch and, if there are any, of a long one, which holds about as many frames."""
        long = (max(1, self.batch * self.length // self.long_length),) if self.long_length else ()
        return (self.batch, *long)


@dataclass(frozen=True)
class TrainConfig:
    tokenizer: PhaseConfig = field(default_factory=PhaseConfig)
    dynamics: PhaseConfig = field(default_factory=PhaseConfig)
    agent: PhaseConfig = field(default_factory=PhaseConfig)
    imagination: PhaseConfig = field(default_factory=PhaseConfig)


@dataclass(frozen=True)
class EvaluateConfig:
    episodes: int = 256  # closed-loop episodes of each policy
    envs: int = 64  # environments stepped together
    clips: int = 32  # held-out clips for the world-model metrics
    context: int = 4  # real frames in front of a generated clip
    frames: int = 16  # generated frames of a clip
    diffusion_baseline: bool = False  # also train those of presets.BASELINES: same size, data and steps


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Where it runs (mesh, hosts) is an argument of the run, not part of it."""

    name: str = "tiny"
    seed: int = 0
    actions: tuple[ActionComponent, ...] = (ActionComponent(),)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        validate(self)


# ---------------------------------------------------------------------------------------------------------------------
# Overrides and JSON


def _coerce(value: Any, hint: Any, at: str) -> Any:
    """Turns JSON or command-line text into the type of a field."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
        raise ConfigError(f"{at} = {value!r}: choose one of {', '.join(map(repr, typing.get_args(hint)))}")
    if origin in (tuple, list):
        inner = typing.get_args(hint)[0]
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.startswith("[") else [v for v in value.split(",") if v]
            except json.JSONDecodeError as e:
                raise ConfigError(f"{at} = {value!r}: is no JSON list ({e})") from None
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{at} = {value!r}: expected a list, as a,b,c or as JSON")
        return tuple(_coerce(v, inner, f"{at}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value):
            return value
        if not isinstance(value, dict):
            raise ConfigError(f"{at} = {value!r}: is a group of fields; set one of them, e.g. {at}.{_names(hint)[0]}")
        return from_dict(typing.cast(type, hint), value, at)
    try:
        if hint is bool:
            table = {"true": True, "1": True, "false": False, "0": False}
            return value if isinstance(value, bool) else table[str(value).lower()]
        if isinstance(value, bool) or value is None:  # Python would read True as 1, and None as "None"
            raise TypeError
        if hint is int:
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            return int(str(value).replace("_", "")) if isinstance(value, str) else int(value)
        if hint is float:
            return float(value)
        if not isinstance(value, str):
            raise TypeError
        return value
    except (ValueError, KeyError, TypeError, OverflowError):
        kind = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{at} = {value!r}: expected a value of type {kind}") from None


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _unknown(kind: str, name: str, choices: list[str]) -> ConfigError:
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], choices, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"unknown {kind} {name!r}; {hint}choose one of: {', '.join(choices)}")


def from_dict(cls: type, values: dict[str, Any], at: str = "") -> Any:
    """Builds the dataclass `cls` from nested dictionaries; unknown names and wrong types raise `ConfigError`."""
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise ConfigError(f"{at or 'config'} = {values!r}: expected a group of fields")
    for name in values:
        if name not in hints:
            raise _unknown("config field", f"{at}.{name}".lstrip("."), _names(cls))
    return cls(**{k: _coerce(v, hints[k], f"{at}.{k}".lstrip(".")) for k, v in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The nested dictionaries of a config, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def complete(tree: Any) -> Any:
    """A config as an earlier version recorded it, with the fields that were added since at their defaults, and those
    that had no effect as they must be now."""

    def fill(node: Any, like: Any) -> Any:
        if not isinstance(node, dict) or not isinstance(like, dict):
            return node
        return {k: fill(v, like.get(k)) for k, v in node.items()} | {k: v for k, v in like.items() if k not in node}

    out = fill(tree, to_dict(Config()))
    phases = out.get("train") if isinstance(out, dict) else None
    for name, phase in phases.items() if isinstance(phases, dict) else ():
        if name != "dynamics" and isinstance(phase, dict):
            phase["image_fraction"] = 0.0
    return out


def override(config: Config, values: dict[str, Any]) -> Config:
    """Returns `config` with dotted fields replaced, e.g. ``{"dynamics.k_max": 8}``. All are applied, then checked."""
    tree = to_dict(config)
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        node: Any = tree
        cls: Any = Config
        hint: Any = None
        for i, part in enumerate([*path, last]):
            if not dataclasses.is_dataclass(cls):
                raise ConfigError(f"unknown config field {dotted!r}: {'.'.join([*path, last][:i])!r} has no fields")
            hints = typing.get_type_hints(cls)
            if part not in hints:
                raise _unknown("config field", ".".join([*path, last][: i + 1]), _names(cls))
            hint = hints[part]
            if i < len(path):
                node, cls = node[part], hint
        coerced = _coerce(value, hint, dotted)
        node[last] = to_dict(coerced) if dataclasses.is_dataclass(coerced) else coerced
    return from_dict(Config, tree)


def parse_overrides(items: list[str]) -> dict[str, str]:
    """``["--dynamics.k_max=8"]`` or ``["dynamics.k_max=8"]`` -> ``{"dynamics.k_max": "8"}``."""
    out = {}
    for item in items:
        name, sep, value = item.lstrip("-").partition("=")
        if not sep:
            raise ConfigError(f"override {item!r}: write it as field=value, e.g. dynamics.k_max=8")
        out[name.replace("-", "_")] = value
    return out


def preset(name: str, /, **overrides: Any) -> Config:
    """The named preset with dotted overrides applied: ``preset("tiny", **{"dynamics.k_max": 8})``."""
    from dreamer4_jax.presets import PRESETS  # it builds configs, so it imports this module

    if name not in PRESETS:
        raise _unknown("preset", name, list(PRESETS))
    return override(PRESETS[name](), overrides)
