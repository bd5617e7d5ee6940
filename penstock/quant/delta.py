"""What a low-rank adapter is: its rank, its scale and the tensors it has beside a weight."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.formats.rows import Shape


@dataclass(frozen=True)
class Delta:
    """What one LoRA adds to a weight W: ``scale * up @ down``, or ``scale * diff``.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.

    Attributes:
        index: which LoRA; its tensors are called ``lora.{index}.down``, ``.up`` or ``.diff``.
        rank: rows of ``down`` and columns of ``up``; 0: a ``diff`` of the shape of W.
        scale: strength, times alpha / rank where there is a rank.
        turned: the halves of the rows of ``up`` change places.
    """

    index: int
    rank: int
    scale: float
    turned: bool = False

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        """Return the shape of each tensor beside a weight of ``shape``, by the name it has in the
        layer."""
        rows, columns = shape
        if not self.rank:
            return {self.name("diff"): shape}
        return {self.name("down"): (self.rank, columns), self.name("up"): (rows, self.rank)}

    def name(self, role: str) -> str:
        """Return the tensor's name in the layer."""
        return f"lora.{self.index}.{role}"
