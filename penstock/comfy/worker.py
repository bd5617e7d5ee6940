"""The nodes' worker: ``python -m penstock.comfy.worker``, a process with ceilings of its own.

It speaks as the server's workers do (`penstock.serve.worker`): orders come in, what happens and how
they end goes out, and the end of its input, which is ComfyUI's end, is its own.
"""

from __future__ import annotations

import os

from penstock.cli.main import prefer_pages
from penstock.comfy.order import NodeOrder
from penstock.serve.worker import Line, Station, be_first_to_go, own_output


def main() -> None:
    """Work until standard input ends."""
    line = Line(own_output())
    be_first_to_go()
    prefer_pages(os.environ)
    station = Station(line)
    station.listen()
    from penstock.comfy.desk import Desk  # torch: somebody listens already

    station.work(Desk(), NodeOrder.from_json)


if __name__ == "__main__":
    main()
