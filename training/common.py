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


class Optimiser:
    """Muon for the hidden matrices and convolutions, AdamW for everything else.

    Muon (Keller Jordan et al., 2024; ``torch.optim.Muon``) takes matrices: a convolution is handed
    over as the matrix of its filters, a view of the same memory.

    Args:
        model: The modules to train.
        outer: Parts of parameter names that AdamW keeps: embeddings, first and last layers.
        rate: Of AdamW.
        matrix_rate: Of Muon, in AdamW's units (``match_rms_adamw``).
        weight_decay: Of both.
    """

    def __init__(
        self,
        model: nn.Module,
        outer: tuple[str, ...],
        rate: float,
        matrix_rate: float,
        weight_decay: float,
    ) -> None:
        self.inner: list[tuple[nn.Parameter, nn.Parameter]] = []
        others = []
        for name, weight in model.named_parameters():
            if weight.numel() > weight.shape[0] and not any(part in name for part in outer):
                matrix = nn.Parameter(_matrix(weight.detach()))
                if matrix.data_ptr() != weight.data_ptr():
                    raise ValueError(f"{name} is not laid out channels last: no matrix shares it")
                self.inner.append((weight, matrix))
            else:
                others.append(weight)
        matrices = [matrix for _, matrix in self.inner]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, matrix_rate, weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                others, rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
            ),
        )
        self.rates = (matrix_rate, rate)

    def step(self, factor: float) -> None:
        """Apply the gradients at ``factor`` of the rates, and drop them."""
        for weight, matrix in self.inner:
            matrix.grad = None if weight.grad is None else _matrix(weight.grad).contiguous()
            weight.grad = None
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)


def _matrix(weight: Tensor) -> Tensor:
    """A weight (out, in, ...) as (out, rest); shares the memory of one laid out channels last."""
    return weight if weight.ndim == 2 else weight.movedim(1, -1).flatten(1)


def save_state(path: Path, step: int, model: nn.Module, optimiser: Optimiser) -> None:
    """Write weights, optimiser moments and the step count so that a kill leaves a whole file."""
    tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in model.state_dict().items()}
    for number, part in enumerate(optimiser.parts):
        for index, state in part.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimiser.{number}.{index}.{key}"] = value
    unique = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    scratch = path.with_suffix(".part")
    save_file(unique, scratch, metadata={"step": json.dumps(step)})
    scratch.replace(path)


def load_state(path: Path, model: nn.Module, optimiser: Optimiser) -> int:
    """Take up a run where ``save_state`` left it; returns the step, 0 without a file."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    model.load_state_dict(
        {key[6:]: value for key, value in tensors.items() if key.startswith("model.")}
    )
    for number, part in enumerate(optimiser.parts):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimiser.{number}."):
                _, _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
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
