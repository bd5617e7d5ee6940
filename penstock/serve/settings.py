"""What a server is told when it starts, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from penstock.errors import UsageError
from penstock.folders import data_folder
from penstock.profiles.options import Options

PORT = 8730
LOOPBACK = ("127.0.0.1", "localhost", "::1")

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a client may take of the server.

    Attributes:
        body_bytes: of a request, pictures included.
        pixels: of a picture.
        waiting: jobs that wait at a time.
        kept_bytes: of all videos and jobs that are kept; None: as the disk allows.
        connections: at a time, open streams of events among them.
        header_s: until a request's headers are there.
        body_s: for each part of a body, and what sending to a client may stall.
        header_bytes: of a request's line and headers together.
    """

    body_bytes: int = 32 * MIB
    pixels: int = 40_000_000
    waiting: int = 1000
    kept_bytes: int | None = None
    connections: int = 512
    header_s: float = 10.0
    body_s: float = 20.0
    header_bytes: int = 16 * 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise UsageError(f"illegal limit {name}", expected="above 0", found=str(value))


@dataclass(frozen=True)
class ServeSettings:
    """A server: its models, its budget, where it keeps things, and whom it answers.

    Attributes:
        models: folders or files by the names that clients use; the first is the default.
        options: budgets and the rest of a run, for all of them.
        folder: its own: the queue and the jobs. One server at a time.
        host, port: where it listens.
        keep_alive_s: seconds without a job after which a worker gives everything back.
        api_key: that every request must carry; None: none.
        allow_urls: pictures may be fetched from http(s) addresses.
        lora_folders: whose files clients may name.
        hosts: by which it may be called besides loopback's and its own address.
        limits: of clients.
        cache: where packs are kept; None: as everywhere.

    Raises:
        UsageError: no model, an address that others reach without a key, or a folder of LoRAs that
            is none.
    """

    models: Mapping[str, str]
    options: Options = field(default_factory=Options)
    folder: Path = field(default_factory=lambda: data_folder() / "serve")
    host: str = "127.0.0.1"
    port: int = PORT
    keep_alive_s: float = 300.0
    api_key: str | None = None
    allow_urls: bool = False
    lora_folders: tuple[Path, ...] = ()
    hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError(
                "a server needs a model", expected="--model DIR or --model NAME=DIR", found="none"
            )
        if not is_loopback(self.host) and not self.api_key:
            raise UsageError(
                f"{self.host} can be reached from other machines",
                expected="--api-key with it",
                found="none",
                remedy="Set a key, or leave --host out: 127.0.0.1 answers this machine alone.",
            )
        for folder in self.lora_folders:
            if not folder.is_dir():
                raise UsageError(
                    f"{folder} holds no LoRAs",
                    expected="--lora-dir with a folder",
                    found="something else" if folder.exists() else "nothing of this name",
                )

    @property
    def default_model(self) -> str:
        """The name of the model that a request without one means."""
        return next(iter(self.models))


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches ``host``."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def named_models(given: list[str]) -> dict[str, str]:
    """Return the models by name, from "NAME=PLACE" or a place, whose last part is then its name.

    Raises:
        UsageError: no name, or one that is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, sign, place = text.partition("=")
        if not sign or Path(text).expanduser().exists():
            name, place = Path(text).expanduser().resolve().name, text
        if not name or not place:
            raise UsageError("not a model", expected="DIR or NAME=DIR", found=text)
        if name in found:
            raise UsageError(
                f"two models are called {name}",
                expected="a name for each",
                found=f"{found[name]} and {place}",
                remedy="Say --model NAME=DIR.",
            )
        found[name] = place
    return found
