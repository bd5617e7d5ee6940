"""Every value of the configs that lie beside a model's networks: what it may be.

Sources: the schedulers of diffusers that penstock sets up, transformers' ``CLIPImageProcessor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from penstock.engine.files.fields import (
    Field,
    either,
    flag,
    maybe,
    number,
    several,
    table,
    text,
    whole,
)

_SHARE = number(0, 1)
_REAL = number(-1e6, 1e6)
_ENDLESS = either(_REAL, Field("infinite", lambda value: value in (float("inf"), -float("inf"))))
SCHEDULER: Mapping[str, Field] = MappingProxyType({
    "num_train_timesteps": whole(2, 100_000),
    "beta_start": _SHARE,
    "beta_end": _SHARE,
    "beta_schedule": text("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": maybe(several(_SHARE, 1, 4096)),
    "solver_order": whole(1, 3),
    "prediction_type": text(),
    "thresholding": flag(),
    "dynamic_thresholding_ratio": _SHARE,
    "sample_max_value": _REAL,
    "predict_x0": flag(),
    "algorithm_type": text("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"),
    "solver_type": text("bh1", "bh2", "midpoint", "heun", "logrho"),
    "lower_order_final": flag(),
    "euler_at_final": flag(),
    "disable_corrector": several(whole(0, 100_000), 0, 4096),
    "lambda_min_clipped": _ENDLESS,
    "use_karras_sigmas": maybe(flag()),
    "use_exponential_sigmas": maybe(flag()),
    "use_beta_sigmas": maybe(flag()),
    "use_lu_lambdas": maybe(flag()),
    "use_flow_sigmas": maybe(flag()),
    "use_dynamic_shifting": flag(),
    "flow_shift": maybe(number(1e-6, 1e6)),
    "shift": number(1e-6, 1e6),
    "shift_terminal": maybe(number(1e-6, 0.999)),
    "base_shift": maybe(_REAL),
    "max_shift": maybe(_REAL),
    "base_image_seq_len": maybe(whole(1, 1 << 24)),
    "max_image_seq_len": maybe(whole(1, 1 << 24)),
    "timestep_spacing": text("linspace", "leading", "trailing"),
    "steps_offset": whole(0, 100_000),
    "final_sigmas_type": text("zero", "sigma_min"),
    "rescale_betas_zero_snr": flag(),
    "invert_sigmas": flag(),
    "stochastic_sampling": flag(),
    "variance_type": maybe(text()),
})  # fmt: skip
"""Of a scheduler_config.json: the entries of the solvers that penstock sets up."""

_SIZE = either(
    whole(1, 4096),
    table({name: whole(1, 4096) for name in ("shortest_edge", "longest_edge", "height", "width")}),
)
_THREE = several(_REAL, 3, 3)
IMAGE_PROCESSOR: Mapping[str, Field] = MappingProxyType({
    "size": _SIZE,
    "crop_size": maybe(_SIZE),
    "image_mean": _THREE,
    "image_std": several(number(1e-6, 1e6), 3, 3),
    "resample": whole(0, 5),
    "rescale_factor": number(1e-9, 1e6),
    "do_resize": flag(),
    "do_center_crop": flag(),
    "do_rescale": flag(),
    "do_normalize": flag(),
    "do_convert_rgb": maybe(flag()),
})  # fmt: skip
"""Of a preprocessor_config.json."""

_AREA = whole(1, 1 << 32)
PROCESSOR: Mapping[str, Field] = MappingProxyType({
    "patch_size": whole(1, 256),
    "merge_size": whole(1, 16),
    "temporal_patch_size": whole(1, 16),
    "size": table({"shortest_edge": _AREA, "longest_edge": _AREA}),
    "image_mean": _THREE,
    "image_std": several(number(1e-6, 1e6), 3, 3),
    "resample": whole(0, 5),
    "rescale_factor": number(1e-9, 1e6),
})  # fmt: skip
"""Of the one in ``processor/``, whose pictures a language model sees (Qwen3-VL): its edges are
pixels of the whole picture."""


DEFAULTS: Mapping[str, Field] = MappingProxyType({
    "width": whole(1, 1 << 16),
    "height": whole(1, 1 << 16),
    "frames": whole(1, 1 << 16),
    "steps": whole(1, 1000),
    "fps": whole(1, 240),
    "guidance_scale": number(0, 1000),
    "shift": number(1e-6, 1000),
    "negative_prompt": text(),
})  # fmt: skip
"""Of a model's defaults.json; a request checks them more narrowly."""

MODEL_INDEX: Mapping[str, Field] = MappingProxyType({
    "_class_name": text(),
    "transformer_2": maybe(several(maybe(text()), 2, 2)),
    "expand_timesteps": maybe(flag()),
    "boundary_ratio": maybe(_SHARE),
})  # fmt: skip
"""Of a model_index.json: what tells one pipeline from another."""
