"""Which tensor of a checkpoint is which weight of a module without weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from penstock.errors import CheckpointError, TensorMismatch, UsageError
from penstock.offload.checkpoint import Checkpoint, TensorEntry, torch_dtype

_log = logging.getLogger(__name__)

FLOATS = ("F64", "F32", "F16", "BF16")
"""What a plain module's weights may be stored in: it computes with them as they are."""


def tie(module: nn.Module) -> None:
    """Tie what transformers ties: making a module without weights may have parted it."""
    own: Any = getattr(module, "tie_weights", None)
    if own is not None:
        own()


def matched(module: nn.Module, checkpoint: Checkpoint) -> dict[int, TensorEntry]:
    """Return where the tensors of ``module`` lie, by their ids: all without values, and buffers
    that the files hold.

    Names are the module's own, or those that transformers' own loading takes for these: with or
    without the prefix of the base model, and as its table of renamed weights says. A weight of
    several names is found under any of them.

    Raises:
        UsageError: a buffer without values that files never hold.
        CheckpointError: the files lack some; names the first.
        TensorMismatch: another shape, or a type that the module does not compute in.
    """
    names, tensors = _names(module)
    files = _as_named(module, checkpoint, {name for own in names.values() for name in own})
    lacking = {key: own for key, own in names.items() if not any(name in files for name in own)}
    missing = [own[0] for key, own in lacking.items() if tensors[key].is_meta]
    if missing:
        raise _missing(module, missing, len(names), checkpoint)
    found: dict[int, TensorEntry] = {}
    for key in names.keys() - lacking.keys():
        name = next(name for name in names[key] if name in files)
        found[key] = checkpoint[files[name]]
        _check(name, tensors[key], found[key])
    unused = set(checkpoint) - {entry.name for entry in found.values()}
    if unused:
        _log.debug("%s: %d tensors are not used: %s ...", checkpoint.path, len(unused), min(unused))
    return found


def _names(module: nn.Module) -> tuple[dict[int, list[str]], dict[int, Tensor]]:
    """Return the names and tensors of what files may hold, by id."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            name = f"{path}.{leaf}".lstrip(".")
            if leaf in owner._non_persistent_buffers_set:
                _check_computed(name, tensor)
            elif tensor is not None and (tensor.is_meta or leaf in owner._buffers):
                names.setdefault(id(tensor), []).append(name)
                tensors[id(tensor)] = tensor
    return names, tensors


def _check_computed(name: str, buffer: Tensor | None) -> None:
    if buffer is not None and buffer.is_meta:
        raise UsageError(
            f"{name} has no values, and files do not hold it",
            expected="buffers as the class computes them; only weights on the meta device",
            found="a module made on the meta device whole",
            remedy="Make it under accelerate.init_empty_weights(include_buffers=False).",
        )


def _as_named(module: nn.Module, checkpoint: Checkpoint, wanted: set[str]) -> dict[str, str]:
    """Return the checkpoint's names by those that the module has for them."""
    if wanted <= set(checkpoint):
        return {name: name for name in checkpoint}
    found: dict[str, str] = {}
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    for name in checkpoint:
        for renamed in _renamings(module, name):
            for candidate in (renamed, renamed.removeprefix(prefix), prefix + renamed):
                if candidate in wanted:
                    found.setdefault(candidate, name)
    return found


def _renamings(module: nn.Module, name: str) -> Sequence[str]:
    """Return ``name``, and what transformers renames it to when it loads such a module."""
    made = name
    for each in _transforms(module):
        made, _ = each.rename_source_key(made)
    return (name,) if made == name else (name, made)


def _transforms(module: nn.Module) -> list[Any]:
    """Return transformers' own, of those that only rename (transformers 5)."""
    if not hasattr(module, "base_model_prefix"):
        return []
    try:
        mapping = import_module("transformers.conversion_mapping")
        loading = import_module("transformers.core_model_loading")
    except ImportError:  # before transformers 5
        return []
    transforms = mapping.get_model_conversion_mapping(module)
    return [each for each in transforms if isinstance(each, loading.WeightRenaming)]


def _check(name: str, tensor: Tensor, entry: TensorEntry) -> None:
    if tuple(tensor.shape) != entry.shape:
        raise TensorMismatch(
            f"{name} does not fit the module",
            expected=str(tuple(tensor.shape)),
            found=f"{entry.shape} in {entry.file}",
            remedy="Make the module from the config that lies beside the weights.",
        )
    plain = entry.dtype in FLOATS if tensor.is_floating_point() else (
        torch_dtype(entry.dtype) == tensor.dtype
    )  # fmt: skip
    if not plain:
        raise TensorMismatch(
            f"{name} is stored in a type that the module does not compute in",
            expected=", ".join(FLOATS) if tensor.is_floating_point() else str(tensor.dtype),
            found=f"{entry.dtype} in {entry.file}",
            remedy='Take the unquantised files, and say format="int8" or "fp8" to stream less.',
        )


def _missing(
    module: nn.Module, missing: Sequence[str], count: int, checkpoint: Mapping[str, TensorEntry]
) -> CheckpointError:
    return CheckpointError(
        f"the files lack {len(missing)} of {count} weights of {type(module).__name__}",
        expected=missing[0],
        found=", ".join(list(checkpoint)[:3]) + ", ...",
        remedy="Give the files of this module, as save_pretrained writes them, or load it and "
        "stream it without `files`.",
    )
