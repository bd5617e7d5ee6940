"""HunyuanVideo 1.5 without its mask of all by all tokens: padded text is left out of attention.

Its processor builds, in every block, a mask that lets no padded text token be seen: two booleans
and one number of the compute dtype for each pair of tokens, 48 of 51 GiB at 1280x720x121 (computed
on fake tensors). Without these tokens there is nothing to mask. It is the same mathematics; sums
are taken over other lengths, so the last bits differ.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

_PROCESSOR = "HunyuanVideo15AttnProcessor2_0"

NOTICE = (
    "HunyuanVideo 1.5: padded text is left out of attention instead of masked: the same "
    "mathematics without 4 bytes a pair of tokens, other last bits; exact=True keeps the mask"
)


def leave_out_padding(module: nn.Module, stack: ExitStack) -> str | None:
    """Put processors that need no mask in the place of those that build one; ``stack`` puts them
    back.

    Returns:
        What to tell the user; None where there is no such processor.
    """
    found = [
        each for each in module.modules()
        if type(getattr(each, "processor", None)).__name__ == _PROCESSOR
    ]  # fmt: skip
    for each in found:
        owner: Any = each
        stack.callback(setattr, owner, "processor", owner.processor)
        owner.processor = Unpadded(owner.processor)
    return NOTICE if found else None


class Unpadded:
    """Attention over video tokens and the text tokens that count.

    Args:
        own: the processor that it stands for.
    """

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)  # the backend that was set, and whatever else

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Map the video (b, n, d) and text (b, m, d), of which the mask (b, m) says what counts,
        to the same; rows of padded text, which nothing reads, become zeros."""
        if encoder_hidden_states is None or attention_mask is None:
            made: tuple[Tensor, Tensor | None] = self._own(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return made
        pairs = [
            self._one(attn, hidden_states[n : n + 1], encoder_hidden_states[n : n + 1], mask,
                      image_rotary_emb)
            for n, mask in enumerate(attention_mask.bool())
        ]  # fmt: skip
        return torch.cat([video for video, _ in pairs]), torch.cat([text for _, text in pairs])

    def _one(
        self, attn: Any, video: Tensor, text: Tensor, counts: Tensor, rope: Any
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        seen = text[:, counts]
        q, k, v = (
            torch.cat([self._video(attn, video, which, rope), self._text(attn, seen, which)], dim=1)
            for which in "qkv"
        )
        out = dispatch_attention_fn(
            q, k, v, backend=self._own._attention_backend,
            parallel_config=self._own._parallel_config,
        ).flatten(2, 3).to(q.dtype)  # fmt: skip
        split = video.shape[1]
        made = torch.zeros_like(text)
        made[:, counts] = attn.to_add_out(out[:, split:])
        return attn.to_out[1](attn.to_out[0](out[:, :split])), made

    @staticmethod
    def _video(attn: Any, states: Tensor, which: str, rope: Any) -> Tensor:
        from diffusers.models.embeddings import apply_rotary_emb

        project = {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v}[which]
        made: Tensor = project(states).unflatten(2, (attn.heads, -1))
        if which == "v":
            return made
        made = {"q": attn.norm_q, "k": attn.norm_k}[which](made)
        return made if rope is None else apply_rotary_emb(made, rope, sequence_dim=1)

    @staticmethod
    def _text(attn: Any, states: Tensor, which: str) -> Tensor:
        project = {"q": attn.add_q_proj, "k": attn.add_k_proj, "v": attn.add_v_proj}[which]
        made: Tensor = project(states).unflatten(2, (attn.heads, -1))
        norm = {"q": attn.norm_added_q, "k": attn.norm_added_k, "v": None}[which]
        return made if norm is None else norm(made)
