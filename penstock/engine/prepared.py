"""A model opened under a budget: what it takes is known, and nothing of it is loaded.

All of it comes from headers and configs. torch is imported only where the device must be asked: it
may be a GPU, or shall multiply in 8 bits. So a plan is given, and a request refused, at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from penstock.engine.attention.choice import attending_on
from penstock.engine.files.locate import Files
from penstock.engine.lora.file import Lora, as_loras
from penstock.engine.model.files import ModelFiles
from penstock.engine.request.generation import GenerationRequest, check_task, workload_of
from penstock.engine.variants import Variants, computing_on
from penstock.errors import UsageError
from penstock.profiles.hardware import Hardware, default_device, probe
from penstock.profiles.phases import Workload
from penstock.profiles.plan import Plan
from penstock.profiles.profile import AUTO, Chosen, Overrides, choose, load


class Prepared:
    """A Wan2.1 model and the budgets and policy it will run under.

    Args:
        model: opened by its headers.
        hardware: the machine.
        chosen: budgets, policy and formats; None: those of the profile "auto".
        cache: where packs are kept; None: `penstock.engine.packs.cache.cache_folder`.

    Attributes:
        chosen: as given, or chosen.
        variants: the model in the formats it may run in.
        model: as its files hold it.
        notices: what is to be said of the device's 8-bit products and attention.
    """

    def __init__(
        self,
        model: ModelFiles,
        hardware: Hardware,
        chosen: Chosen | None = None,
        cache: Path | None = None,
    ) -> None:
        chosen = chosen or choose(load(AUTO), Overrides(), hardware)
        device, mode = chosen.hardware.place, chosen.policy.compute
        computing, products = computing_on(device, mode)
        heads, tag = model.manifest.heads, model.streamed.tag
        self.chosen, attention = attending_on(chosen, heads, tag)
        self.notices = (*products, *attention)
        self.variants = Variants(model, self.chosen, computing, cache)
        self.model = self.variants.stored

    @classmethod
    def open(
        cls,
        model: str | Path | None,
        *,
        files: Files | None = None,
        loras: Sequence[Lora | str | Path] = (),
        format: str | None = None,
        compute: str | None = None,
        attention: str | None = None,
        vram: str | int | None = None,
        ram: str | int | None = None,
        device: str = "auto",
        profile: str = AUTO,
        overrides: Overrides | None = None,
        cache: Path | None = None,
    ) -> Prepared:
        """Open a model; reads headers only.

        Args:
            As `penstock.engine.engine.Engine.open`.

        Raises:
            As `penstock.engine.engine.Engine.open`.
        """
        base = overrides or Overrides()
        flags = replace(
            base,
            vram=vram,
            ram=ram,
            format=format or base.format,
            compute=compute or base.compute,
            attention=attention or base.attention,
        )
        hardware = probe(_device_type(device))
        chosen = choose(load(profile), flags, hardware)
        return cls(ModelFiles.open(model, files, as_loras(loras)), hardware, chosen, cache)

    @property
    def hardware(self) -> Hardware:
        """What is planned for: the device, its budgets and its rates."""
        return self.chosen.hardware

    def plan(self, request: GenerationRequest, *, kept: bool = False) -> Plan:
        """As `penstock.engine.engine.Engine.plan`.

        Raises:
            OverBudget: no plan fits the budgets.
            RequestError: the request does not suit the model.
        """
        check_task(request, image_to_video=self.model.image_to_video)
        return self.plan_workload(workload_of(request, kept=kept))

    def plan_workload(self, workload: Workload) -> Plan:
        """As `penstock.engine.engine.Engine.plan_workload`.

        Raises:
            OverBudget: no plan fits the budgets; names a profile or a request that does.
        """
        found = self.variants.plan(workload)
        return replace(found, origins=found.origins + self.model.loras.origins())


def _device_type(name: str) -> str:
    if name == "auto":
        return default_device()
    if name not in ("cuda", "cpu"):
        raise UsageError("unknown device", expected="auto, cuda or cpu", found=repr(name))
    if name == "cuda":
        _check_cuda()
    return name


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "no CUDA device",
            expected="a CUDA build of torch and a working driver",
            found=f"torch {torch.__version__}",
            remedy="Install a CUDA build of torch, or pass --device cpu.",
        )
