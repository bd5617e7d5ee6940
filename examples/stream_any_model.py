"""A module that penstock knows nothing of, run in a fraction of its memory.

    python examples/stream_any_model.py

The module is a text encoder of transformers with random weights; any module with a list of blocks
will do, as long as gradients are not asked for.
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel

import penstock


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=128, num_hidden_layers=12, num_attention_heads=4,
                        intermediate_size=512, vocab_size=1000)  # fmt: skip
    model = BertModel(config).eval()
    ids = torch.randint(0, 1000, (2, 16))
    with torch.no_grad():
        resident = model(ids).last_hidden_state

    # Too little is refused with the least that is enough.
    try:
        penstock.stream(model, "encoder.layer", vram="1KiB", ram="2MiB")
    except penstock.OverBudget as error:
        least = error.need_bytes
        print(error)

    with penstock.stream(model, "encoder.layer", vram=least, ram="2MiB") as streamed:
        with torch.no_grad():
            states = model(ids).last_hidden_state
        report = streamed.report
        weights = f"{report.weight_bytes:,} bytes of blocks"
        print(f"{weights} in {report.peak_vram_bytes:,} bytes of VRAM")
    print("the same result:", torch.equal(states, resident))

    int8 = penstock.stream(model, "encoder.layer", vram=least, ram="2MiB", format="int8")
    with int8, torch.no_grad():
        states = model(ids).last_hidden_state
    cosine = torch.nn.functional.cosine_similarity(states.flatten(), resident.flatten(), dim=0)
    print(f"from int8 weights: cosine {cosine:.5f}")


if __name__ == "__main__":
    main()
