"""What is answered, for the OpenAPI page. The answers themselves are plain values."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong, what was expected, what was found, and what to do next."""

    code: str
    message: str
    type: str
    param: str | None = None
    expected: str | None = None
    found: str | None = None
    remedy: str | None = None
    plan: dict[str, Any] | None = None


class ErrorBody(BaseModel):
    """Every answer of 4xx and 5xx."""

    error: ErrorDetail


class VideoErrorBody(BaseModel):
    """Why a video has failed."""

    code: str
    message: str


class VideoBody(BaseModel):
    """A video: the dialect's fields, then ours."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str
    seconds: str
    quality: str
    remixed_from_video_id: str | None
    error: VideoErrorBody | None
    paused: bool
    position: int | None
    phase: str | None
    step: int | None
    steps: int | None
    unit: str | None
    eta_s: float | None
    plan: dict[str, float | int]
    budget: dict[str, int]
    used: dict[str, int | None]
    settings: dict[str, Any]
    lora: list[str]
    cache: str | None
    report: dict[str, Any] | None
    urls: dict[str, str | None]


class ListBody(BaseModel):
    """Some videos, and whether there are more."""

    object: Literal["list"]
    data: list[VideoBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedBody(BaseModel):
    """A video is gone."""

    id: str
    object: Literal["video.deleted"]
    deleted: bool


class PlanBody(BaseModel):
    """What a request takes, or what keeps it from fitting."""

    object: Literal["plan"]
    model: str
    fits: bool
    seconds: float | None
    vram_bytes: int | None
    ram_bytes: int | None
    vram_limit_bytes: int
    ram_limit_bytes: int
    phases: list[dict[str, Any]]
    weight_format: str | None
    problem: dict[str, Any] | None
    nearest: dict[str, Any] | None
    alternatives: list[dict[str, Any]]
    video_seconds: str
    settings: dict[str, Any]


class QueueBody(BaseModel):
    """Which videos are being made, and which wait."""

    object: Literal["queue"]
    paused: bool
    running: list[str]
    waiting: list[str]


class ModelsBody(BaseModel):
    """Models, or LoRAs, by name."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class HealthBody(BaseModel):
    """That the server answers."""

    status: Literal["ok"]
    version: str
