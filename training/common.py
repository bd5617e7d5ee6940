"""What both training stages share: devices, schedules, checkpoints."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SAVE_EVERY = 120.0
"""Seconds between checkpoints."""


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rate_at(step: int, steps: int, warmup: int, decay: float) -> float:
    """Learning rate factor: linear warm-up, constant, linear fall over the last share ``decay``."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def save_state(path: Path, step: int, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write weights, optimiser moments and the step count so that a kill leaves a whole file."""
    tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in model.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors.update({f"optimiser.{index}.{key}": value for key, value in state.items()})
    unique = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    scratch = path.with_suffix(".part")
    save_file(unique, scratch, metadata={"step": json.dumps(step)})
    scratch.replace(path)


def load_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Take up a run where ``save_state`` left it; returns the step, 0 without a file."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    model.load_state_dict(
        {key[6:]: value for key, value in tensors.items() if key.startswith("model.")}
    )
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    return read_step(path)


def read_step(path: Path) -> int:
    """The step count stored in a checkpoint."""
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        return int(handle.metadata()["step"])


@torch.no_grad()
def follow(average: Iterable[Tensor], current: Iterable[Tensor], keep: float) -> None:
    """Move an exponential average of the weights one step towards the current ones."""
    torch._foreach_lerp_(list(average), list(current), 1.0 - keep)


def psnr(a: Tensor, b: Tensor, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB of two tensors whose range spans ``peak``."""
    return float(10 * torch.log10(peak**2 / (a - b).square().mean()))
