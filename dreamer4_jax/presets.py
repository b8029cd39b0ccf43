"""The presets: one function for each size, from a laptop to the paper's model."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dreamer4_jax.config import (
    ActionComponent,
    AgentConfig,
    Config,
    DataConfig,
    DynamicsConfig,
    PhaseConfig,
    TokenizerConfig,
    TrainConfig,
    TransformerConfig,
)


def _tiny() -> Config:
    """Laptop: BabyAI at 64 x 64, 16 spatial tokens."""
    tok = TransformerConfig(
        layers=1, width=64, heads=4, kv_heads=4, head_dim=16, ffn=176, time_every=0, window=1, local_space=2.5
    )
    return Config(name="tiny", tokenizer=TokenizerConfig(encoder=tok, decoder=tok))


def _small() -> Config:
    """One consumer GPU, 64 x 64 video such as CoinRun."""
    tok = TransformerConfig(layers=4, width=256, heads=4, kv_heads=4, head_dim=64, ffn=704, window=16, dtype="bfloat16")
    dyn = TransformerConfig(layers=8, width=256, heads=8, kv_heads=4, head_dim=32, ffn=704, window=32, dtype="bfloat16")
    return Config(
        name="small",
        tokenizer=TokenizerConfig(latents=64, channels=16, pack=2, encoder=tok, decoder=tok),
        dynamics=DynamicsConfig(transformer=dyn, registers=4, k_max=64),
        agent=AgentConfig(hidden=256),
        data=DataConfig(chunk=96),
        train=TrainConfig(dynamics=PhaseConfig(steps=50_000, batch=16, length=24, long_length=64, image_fraction=0.3)),
    )


def _base() -> Config:
    """One data-centre GPU or a small TPU slice, 128 x 128 video."""
    tok = TransformerConfig(
        layers=8, width=512, heads=8, kv_heads=8, head_dim=64, ffn=1408, window=16, dtype="bfloat16", remat="dots"
    )
    dyn = TransformerConfig(
        layers=16, width=768, heads=12, kv_heads=4, head_dim=64, ffn=2048, window=64, dtype="bfloat16", remat="full"
    )
    return Config(
        name="base",
        tokenizer=TokenizerConfig(
            height=128, width=128, latents=256, latent_grid=True, channels=16, pack=2, encoder=tok, decoder=tok
        ),
        dynamics=DynamicsConfig(transformer=dyn, registers=6, k_max=64),
        agent=AgentConfig(hidden=512),
        data=DataConfig(chunk=192),
        train=TrainConfig(dynamics=PhaseConfig(steps=200_000, batch=32, length=32, long_length=96, image_fraction=0.3)),
    )


def _paper() -> Config:
    """The paper's Minecraft model: 400M tokenizer, 1.6B dynamics, 360 x 640 padded to 384 x 640."""
    tok = TransformerConfig(
        layers=12,
        width=1024,
        heads=16,
        kv_heads=16,
        head_dim=64,
        ffn=4096,
        window=16,
        dtype="bfloat16",
        remat="full",
        rope_base_space=10_000.0,
    )
    dyn = TransformerConfig(
        layers=36,
        width=2048,
        heads=16,
        kv_heads=4,
        head_dim=128,
        ffn=5504,
        window=192,
        dtype="bfloat16",
        remat="full",
        rope_base_space=10_000.0,
    )
    keys = ActionComponent("keys", "binary", 23)
    mouse = ActionComponent("mouse", "mouse", 121)
    phase = PhaseConfig(steps=100_000, batch=256, length=64, long_length=256, image_fraction=0.3, lr=3e-4, warmup=1000)
    return Config(
        name="paper",
        actions=(keys, mouse),
        tokenizer=TokenizerConfig(
            height=384,
            width=640,
            patch=16,
            latents=512,
            latent_grid=False,
            channels=16,
            pack=2,
            encoder=tok,
            decoder=tok,
        ),
        dynamics=DynamicsConfig(transformer=dyn, registers=29, k_max=64),
        agent=AgentConfig(hidden=2048, head_layers=3, task_words=1, task_vocab=20, context=192, horizon=16),
        data=DataConfig(chunk=256),
        train=TrainConfig(
            tokenizer=dataclasses.replace(phase, length=16, long_length=0, image_fraction=0.0),
            dynamics=phase,
            agent=dataclasses.replace(phase, image_fraction=0.0),
            imagination=dataclasses.replace(phase, length=192, long_length=0, image_fraction=0.0),
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {"tiny": _tiny, "small": _small, "base": _base, "paper": _paper}


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A dynamics model that is trained beside the run's own, on the same data and for as many steps.

    Attributes:
      title: what reports call it.
      fields: what its config has otherwise.
    """

    title: str
    fields: dict[str, Any]


# As the paper's baseline predicts (Table 2, first row).
V_PREDICTION: dict[str, Any] = {"dynamics.prediction": "v", "dynamics.loss_space": "v"}
# By phase. They differ from the shortcut model in nothing but these fields: the ramp weight stays, for one.
BASELINES: dict[str, Baseline] = {
    "diffusion": Baseline("diffusion forcing, x-prediction", {"dynamics.objective": "diffusion"}),
    "diffusion_v": Baseline("diffusion forcing, v-prediction", {"dynamics.objective": "diffusion", **V_PREDICTION}),
}
