"""MiniMax-H3 with random weights, which `penstock bench` makes on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from penstock.engine.bench.synthetic import Synthetic
from penstock.engine.families.minimax_h3.builtin import PRUNED
from penstock.engine.families.minimax_h3.config import SCHEDULER, SOUND_SHIFT
from penstock.engine.families.minimax_h3.config import TRANSFORMER as WHOLE
from penstock.engine.families.minimax_h3.family import PIPELINE
from penstock.engine.families.minimax_h3.kinds import TRANSFORMER
from penstock.engine.families.minimax_h3.sound import tiny as sound
from penstock.engine.families.minimax_h3.text import tiny as text
from penstock.engine.families.minimax_h3.video_vae import tiny as video

_TEXT: Mapping[str, Any] = MappingProxyType({"intermediate_size": 48})


class _H3(Synthetic):
    """The transformer has its true shapes; the text encoder is thin and as wide as its states, both
    VAEs are small: denoising is measured, nothing else."""

    def write_rest(self, folder: Path, seed: int) -> None:
        """As `Synthetic.write_rest`."""
        config = self.streamed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            text.write(folder, torch.bfloat16, {"hidden_size": config["text_dim"], **_TEXT})
            parts = {
                "vae": video.vae(torch.bfloat16, config["in_channels"]),
                "audio_vae": sound.audio_vae(config["audio_in_channels"]),
            }
        index: dict[str, Any] = {"_class_name": PIPELINE}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            index[name] = ["diffusers", type(part).__name__, {"subfolder": name}]
        for name, shift in (("scheduler", SCHEDULER["shift"]), ("audio_scheduler", SOUND_SHIFT)):
            (folder / name).mkdir()
            told = json.dumps({**SCHEDULER, "shift": shift})
            (folder / name / "scheduler_config.json").write_text(told, encoding="utf-8")
            index[name] = ["diffusers", SCHEDULER["_class_name"], {"subfolder": name}]
        index |= {
            "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration",
                             {"subfolder": "text_encoder"}],
            "tokenizer": ["transformers", "Qwen2TokenizerFast", {"subfolder": "tokenizer"}],
            "transformer": ["diffusers", TRANSFORMER.made_by[1], {"subfolder": "transformer"}],
        }  # fmt: skip
        (folder / "modular_model_index.json").write_text(json.dumps(index), encoding="utf-8")


SYNTHETIC: Mapping[str, Synthetic] = MappingProxyType({
    "minimax-h3": _H3(TRANSFORMER, WHOLE),
    "minimax-h3-pruned": _H3(TRANSFORMER, MappingProxyType({**WHOLE, **PRUNED})),
})  # fmt: skip
