"""A video as clients see it: the dialect's fields, and ours beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.serve.hub import Live
from penstock.serve.queue import COMPLETED, FAILED, RUNNING, Row

_NAMES = {
    "frames": "num_frames", "steps": "num_inference_steps", "shift": "flow_shift",
}  # fmt: skip
_FILES = ("image", "last_image", "after")


def video(row: Row, live: Live | None, waiting: Sequence[str]) -> dict[str, Any]:
    """Return the object of ``/v1/videos``.

    Args:
        row: of the queue.
        live: what its worker tells.
        waiting: the ids of those that wait, in order.
    """
    settings, plan = row.order["settings"], row.plan
    told: Mapping[str, Any] = live.told if live is not None else {}
    ended = row.status in (COMPLETED, FAILED)
    error = row.error
    return {
        "id": row.id,
        "object": "video",
        "model": row.order["model"],
        "status": row.status,
        "progress": max(row.progress, told.get("progress", 0)),
        "created_at": int(row.created_at),
        "completed_at": int(row.completed_at) if row.completed_at and ended else None,
        "expires_at": None,
        "prompt": settings["prompt"],
        "size": settings["size"],
        "seconds": f"{settings['frames'] / settings['fps']:.6g}",
        "quality": "standard",
        "remixed_from_video_id": row.order.get("continues"),
        "error": None if error is None else {"code": error["code"], "message": error["message"]},
        "paused": row.paused,
        "position": waiting.index(row.id) if row.id in waiting else None,
        "phase": told.get("phase"),
        "step": told.get("step"),
        "steps": told.get("total"),
        "unit": told.get("unit"),
        "eta_s": told.get("eta_s", None if ended else plan["seconds"]),
        "plan": {name: plan[name] for name in ("seconds", "vram_bytes", "ram_bytes")},
        "budget": {"vram_bytes": plan["vram_limit_bytes"], "ram_bytes": plan["ram_limit_bytes"]},
        "used": {"vram_bytes": told.get("vram_bytes"), "ram_bytes": told.get("ram_bytes")},
        "settings": sendable(settings),
        "lora": [f"{name}:{scale:g}" for name, scale in row.order["lora_names"]],
        "cache": row.order.get("cache"),
        "report": _report(row.report),
        "urls": _urls(row, live),
    }


def sendable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under the names by which they are asked for, so that they can be sent
    again."""
    said = {
        _NAMES.get(name, name): value
        for name, value in settings.items()
        if name not in _FILES and value is not None
    }
    if (high := said.pop("guidance_high", None)) is not None:
        said["guidance_scale"], said["guidance_scale_2"] = high, said["guidance_scale"]
    said.pop("clip_crop", None)
    return said


def _report(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a finished job took."""
    if report is None:
        return None
    names = ("seconds", "peak_vram_bytes", "peak_ram_bytes", "process_peak_bytes", "notices")
    return {name: report.get(name) for name in names}


def _urls(row: Row, live: Live | None) -> dict[str, str | None]:
    base, settings = f"/v1/videos/{row.id}", row.order["settings"]
    done = row.status == COMPLETED
    seen = live is not None and live.preview is not None and row.status in (RUNNING, "queued")
    return {
        "content": f"{base}/content" if done else None,
        "thumbnail": f"{base}/content?variant=thumbnail" if done else None,
        "last_frame": f"{base}/last_frame" if done else None,
        "preview": f"{base}/preview" if seen else None,
        "input": f"{base}/input" if settings.get("image") is not None else None,
        "events": f"{base}/events",
    }
