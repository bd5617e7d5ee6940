"""What the oldest versions of the libraries do otherwise, for tests that compare with them."""

import pytest
import transformers

TRANSFORMERS_4 = transformers.__version__.startswith("4.")


def bare_clip(encoder):
    """The modules of a ``CLIPVisionModel``: transformers 4 wraps what 5 has bare."""
    return getattr(encoder, "vision_model", encoder)


def needs_sdpa_in_umt5():
    """Skip what compares UMT5 bit for bit where transformers does not call torch's attention."""
    if TRANSFORMERS_4:
        pytest.skip("transformers 4 forms UMT5's scores by itself: equal but for rounding")
