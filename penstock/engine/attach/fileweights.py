"""The weights of a module that has none: where they lie in files, and what types they have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.attach.filenames import matched
from penstock.engine.packs.layout import Spec
from penstock.errors import UsageError
from penstock.offload.checkpoint import Checkpoint, TensorEntry, torch_dtype
from penstock.quant.values.tensors import dtype_tag

Places = dict[int, list[tuple[nn.Module, str]]]
"""Where each tensor stands, by its id: sub-module and name there."""


class FileWeights:
    """Weights in files, of a module that is on the meta device.

    The module's weights have the files' types meanwhile, as ``load_state_dict(assign=True)`` gives
    them; those that its class keeps in fp32 (``_keep_in_fp32_modules``) may have that one.

    Args:
        module: itself; its tied weights are tied.
        path: a ``.safetensors`` file, an index, or a folder with either.
        stack: closes the files and gives the module its own types back.
        kept: weights, by what stands between the dots of their names, that are used in fp32.

    Attributes:
        places: where each tensor of the module stands.
        entries: where each of them lies in files, by its id.

    Raises:
        UsageError: buffers without values that no file holds.
        CheckpointError: no such files, or weights that they lack.
        TensorMismatch: another shape, or a type that the module does not compute in.
    """

    def __init__(
        self, module: nn.Module, path: Path, stack: ExitStack, kept: Collection[str] = ()
    ) -> None:
        self._checkpoint = stack.enter_context(Checkpoint.open(path))
        self.places = _places(module)
        self.entries: Mapping[int, TensorEntry] = matched(module, self._checkpoint)
        upcast = _named(module, set(kept))
        for key, entry in self.entries.items():
            tensor = getattr(*self.places[key][0])
            stack.callback(_set_dtype, tensor, tensor.dtype)
            floats = tensor.is_floating_point() and key in upcast
            _set_dtype(tensor, torch.float32 if floats else torch_dtype(entry.dtype))

    @property
    def files(self) -> Collection[Path]:
        """The files that hold them."""
        return self._checkpoint.files

    def spec(self, weight: Tensor) -> Spec:
        """Return the dtype tag and shape, as it is used."""
        return dtype_tag(weight.dtype), tuple(weight.shape)

    def is_stored_so(self, weight: Tensor) -> bool:
        """Return whether it is used as the files have it."""
        return torch_dtype(self.entries[id(weight)].dtype) == weight.dtype

    def value(self, weight: Tensor) -> Tensor:
        """Return the weight, read now.

        Raises:
            CheckpointChanged: the file was truncated or touched.
        """
        return self._checkpoint.read(self.entries[id(weight)].name).to(weight.dtype)

    def fill_buffers(self, stack: ExitStack) -> None:
        """Read the buffers that files hold; ``stack`` takes them out again."""
        for key, own in self.places.items():
            for owner, leaf in own:
                buffer = owner._buffers.get(leaf)
                if buffer is not None and key in self.entries:
                    owner._buffers[leaf] = self.value(buffer)
                    stack.callback(owner._buffers.__setitem__, leaf, buffer)


def kept_in_fp32(module: Any, path: Path) -> tuple[str, ...]:
    """Return what the class of ``module`` keeps in fp32 where its files at ``path`` are in half: as
    diffusers' and transformers' own loading does."""
    strict = getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    loose = getattr(module, "_keep_in_fp32_modules", None) or ()
    if not hasattr(module, "base_model_prefix"):
        return (*strict, *loose)  # diffusers
    with Checkpoint.open(path) as files:
        is_fp16 = any(entry.dtype == "F16" for entry in files.values())
    return (*strict, *(loose if is_fp16 else ()))


def check_away(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are in memory.

    Raises:
        UsageError: names the first.
    """
    for name, weight in weights.items():
        if not weight.is_meta:
            raise UsageError(
                "weights in memory are not streamed from files",
                expected="blocks on the meta device",
                found=f"{name} with its values",
                remedy="Leave `files` out, or make the module without weights.",
            )


def _named(module: nn.Module, parts: set[str]) -> set[int]:
    return {
        id(p)
        for name, p in module.named_parameters(remove_duplicate=False)
        if parts & set(name.split("."))
    }


def _places(module: nn.Module) -> Places:
    """Return the places of all parameters and buffers."""
    places: Places = {}
    for owner in module.modules():
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append((owner, leaf))
    return places


def _set_dtype(tensor: Tensor, dtype: torch.dtype) -> None:
    tensor.data = tensor.data.to(dtype)
