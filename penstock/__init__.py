"""penstock: video models far larger than the card, inside a byte budget."""

from penstock._version import __version__

__all__ = ["__version__"]
