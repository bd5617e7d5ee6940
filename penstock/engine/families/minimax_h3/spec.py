"""MiniMax-H3's transformer in the planner's terms: the numbers in its config and the bytes in its
headers."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.families.minimax_h3.config import MODALITIES
from penstock.profiles.manifest import LoraSpec, Storage, Weights


@dataclass(frozen=True)
class PackedSpec:
    """The transformer, by the names of its config.

    Attributes:
        weights: of the blocks, and of what each forward pass needs outside them.
        once_bytes: what serves once a job outside the blocks: the text's refiner, the time
            embedding and the last norm's projection.
        table_block_bytes: of each block's AdaLN projection, which serves once a job too.
        table_storage: how these are stored.
    """

    weights: Weights
    once_bytes: int
    table_block_bytes: tuple[int, ...]
    num_layers: int
    num_refiner_layers: int
    num_attention_heads: int
    attention_head_dim: int
    hidden_size: int
    ffn_dim: int
    in_channels: int
    audio_in_channels: int
    text_dim: int
    freq_dim: int
    time_embed_hidden_dim: int
    time_embed_dim: int
    rope_freq_dim: int
    time_table_size: int = 0
    adaln_rank: int = 0
    patch_volume: int = 4
    storage: Storage = Storage()
    table_storage: Storage = Storage()
    lora: LoraSpec = LoraSpec()

    @property
    def inner_dim(self) -> int:
        """Width of queries, keys and values, all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def video_width(self) -> int:
        """Of a row of the video."""
        return self.in_channels * self.patch_volume

    def table_bytes(self, timesteps: int) -> int:
        """Return the tables of one step with so many distinct timesteps."""
        block = 6 * MODALITIES * self.hidden_size
        blocks = self.num_layers * block * self.weights.itemsize
        return timesteps * (blocks + 2 * self.hidden_size * self.time_itemsize)

    @property
    def time_itemsize(self) -> int:
        """Bytes of a value of the time embedding that its projections take, and of what the last
        one gives: a pruned model keeps both in fp32."""
        return 4 if self.time_table_size else self.weights.itemsize

    @property
    def time_width(self) -> int:
        """Of what the AdaLN projections take."""
        return self.adaln_rank or self.time_embed_dim

    @property
    def time_values(self) -> int:
        """Values that one timestep takes while it is embedded."""
        if self.time_table_size:
            return 3 * self.adaln_rank + 3  # two points and what lies between; where it lies
        return self.time_embed_dim + self.freq_dim + 3 * self.time_embed_hidden_dim
