"""The networks of MiniMax-H3, as files hold them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from penstock.engine.families.minimax_h3 import config as configs
from penstock.engine.families.minimax_h3 import structure
from penstock.engine.families.minimax_h3.fields import check_config
from penstock.engine.families.minimax_h3.keys import NAMINGS
from penstock.engine.families.minimax_h3.sound.kind import AUDIO
from penstock.engine.families.minimax_h3.text.kind import TEXT
from penstock.engine.families.minimax_h3.video_vae.kind import VAE
from penstock.engine.family.protocol import ComponentKind

TRANSFORMER = ComponentKind(
    name="transformer",
    made_by=("diffusers", "MiniMaxH3Transformer3DModel"),
    variants=("MiniMaxH3PrunedTransformer3DModel",),
    namings=NAMINGS,
    derive=configs.derive_transformer,
    shapes=structure.transformer_shapes,
    title=configs.transformer_title,
    defaults=configs.TRANSFORMER,
    blocks=structure.BLOCKS,
    count=lambda config: int(config["num_layers"]),
    leaves_stream=structure.leaves_stream,
    run_outside=structure.run_outside,
    is_packed=True,
    keeps_single=structure.keeps_single,
    check=check_config,
)

KINDS: Mapping[str, ComponentKind] = MappingProxyType(
    {kind.name: kind for kind in (TRANSFORMER, TEXT, VAE, AUDIO)}
)
