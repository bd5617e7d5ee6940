"""What the oldest versions of the libraries do otherwise, for tests that compare with them.

transformers 4 forms UMT5's scores by itself where 5 calls torch's attention, and diffusers 0.36
gives its blocks tokens that are not contiguous: both compute the same in another order.
"""

from importlib.metadata import version

import diffusers
import pytest
import torch
import transformers

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
DIFFUSERS_0_36 = diffusers.__version__.startswith("0.36.")
BITSANDBYTES_0_48 = version("bitsandbytes").startswith("0.48.")
PEFT_0_17 = version("peft").startswith("0.17.")


def needs_loras_of_diffusers(style):
    """Skip a style of LoRA files that old versions apply otherwise than those that are followed."""
    if style == "peft alpha" and PEFT_0_17:
        pytest.skip("peft 0.17 applies alpha patterns otherwise than 0.18 and newer")
    if style == "lightx2v" and DIFFUSERS_0_36:
        pytest.skip("diffusers 0.36 applies whole differences otherwise than newer ones")


def bare_clip(encoder):
    """The modules of a ``CLIPVisionModel``: transformers 4 wraps what 5 has bare."""
    return getattr(encoder, "vision_model", encoder)


def needs_sdpa_in_umt5():
    """Skip what compares UMT5 bit for bit where transformers does not call torch's attention."""
    if TRANSFORMERS_4:
        pytest.skip("transformers 4 forms UMT5's scores by itself: equal but for rounding")


def same_after_umt5(found, wanted):
    """Whether results of a pipeline, texts encoded by penstock and by transformers, are the same:
    to the bit, or with transformers 4 to 1e-4 (2e-6 were seen), one step of 8 bits."""
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    if TRANSFORMERS_4:
        bound = 1e-4 if found.is_floating_point() else 1
        return bool((found.double() - wanted.double()).abs().max() <= bound)
    return torch.equal(found, wanted)
