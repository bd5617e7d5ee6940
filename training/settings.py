"""Every number of the training run in one place."""

from dataclasses import dataclass

FRAMES = 17
FPS = 8
BUCKETS = ((64, 64), (64, 96), (96, 64))
"""Heights and widths in pixels."""
BUCKET_SHARES = (0.8, 0.1, 0.1)

VAE_CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
TEXT_WIDTH = 128
TEXT_CONFIG = {
    "d_model": TEXT_WIDTH,
    "d_kv": 32,
    "num_heads": 4,
    "d_ff": 256,
    "num_layers": 2,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 64,
    "tie_word_embeddings": True,
}
IMAGE_WIDTH = 96
IMAGE_SIDE = 32
IMAGE_CONFIG = {
    "hidden_size": IMAGE_WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": IMAGE_SIDE,
    "patch_size": 8,
    "projection_dim": IMAGE_WIDTH,
    "hidden_act": "gelu",
}
DIT_WIDTH = 192
DIT_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 6,
    "image_dim": IMAGE_WIDTH,
    "added_kv_proj_dim": DIT_WIDTH,
    "rope_max_seq_len": 256,
}


@dataclass(frozen=True)
class VaeRun:
    """The autoencoder's run.  Crops are centred near the shape; clips and pictures come last."""

    steps: int = 5_000
    seed: int = 11
    rate: float = 1.5e-3
    matrix_rate: float = 3e-3
    warmup: int = 50
    decay: float = 0.3
    """Share of the steps, at the end, over which the rate falls linearly to zero."""
    whole: float = 0.25
    """Share of the steps after which clips, first frames and condition clips come instead."""
    pictures: int = 12
    """First frames in a step of first frames."""
    first: float = 3.0
    """Weight of a clip's first frame in the loss: people compare it with their picture."""
    crop: int = 32
    batch: int = 6
    kl: float = 1e-5
    polish: int = 1_500
    """Steps of the decoder alone at the end."""


@dataclass(frozen=True)
class EncodeRun:
    """Precomputed latents: several motions of every picture."""

    scenes: int = 3072
    motions: int = 4
    shard: int = 16
    """Scenes per file."""


@dataclass(frozen=True)
class DitRun:
    """The joint run of transformer, text encoder and image encoder."""

    steps: int = 4_000
    seed: int = 12
    rate: float = 1e-3
    matrix_rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.3
    batch: int = 16
    clip: float = 1.0
    weight_decay: float = 0.01
    ema: float = 0.998
    shift: float = 3.0
    """Of the noise levels seen in training."""
    drop_prompt: float = 0.1
    turns: float = 0.0
    """Least share of a batch whose clips turn; 0 leaves it to how often they were drawn."""
    focus: float = 0.0
    """Share of the loss that is weighted by where the motions of a picture differ."""


VAE = VaeRun()
REFINE = VaeRun(steps=4_000, rate=8e-4, matrix_rate=1.6e-3, decay=0.6, whole=0.0)
"""The autoencoder's run from weights that are trained already."""
ENCODE = EncodeRun()
DIT = DitRun()
TURNS = DitRun(
    steps=6_000, seed=13, rate=8e-4, matrix_rate=1.6e-3, warmup=50, decay=0.7, turns=0.5, focus=0.7
)
"""The end of the transformer's run, with more of what is hardest to learn."""
