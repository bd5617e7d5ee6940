"""``/v1/videos``: the dialect's routes, and ours beside them."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from penstock.serve.answers import ERRORS, Json
from penstock.serve.fields import PlanFields, VideoFields, read_fields
from penstock.serve.hub import Event, Subscription
from penstock.serve.order import IMAGE
from penstock.serve.queue import COMPLETED, FAILED
from penstock.serve.schemas import (
    DeletedBody,
    HealthBody,
    ListBody,
    ModelsBody,
    PlanBody,
    QueueBody,
    VideoBody,
)
from penstock.serve.service import NotFound, Service

POLL_MS = "1000"
"""What `openai`'s client waits between two looks."""

_MOST_FILES, _MOST_FIELDS = 4, 100
_PING_S = 15
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "Events.",
    }
}

Id = Annotated[str, Path(description="As the video's object has it.", max_length=100)]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route may refuse with, besides what every route may."""
    return {status: ERRORS[status] for status in (401, 403, 421, *statuses)}


def _body(kind: type[PlanFields], files: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return how a request's body is declared: the route reads it itself."""
    schema = kind.model_json_schema()
    form = json.loads(json.dumps(schema))
    for name in files:
        form["properties"][name] = {"type": "string", "format": "binary"}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def _binary(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """Return how an answer that is a file is declared."""
    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}
    return {200: {"content": content, "description": "The file."}}


async def _given(request: Request, service: Service) -> dict[str, Any]:
    """Return the fields of a form or of a JSON object; files as their bytes.

    Raises:
        HTTPException: the body is neither.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _form(request, service)
    if kind != "application/json":
        raise HTTPException(415, "expected multipart/form-data or application/json")
    try:
        value = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is no JSON") from error
    if not isinstance(value, dict):
        raise HTTPException(400, "the body is no JSON object")
    return value


async def _form(request: Request, service: Service) -> dict[str, Any]:
    limits = service.settings.limits
    try:
        async with request.form(
            max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=limits.body_bytes
        ) as form:
            found: dict[str, Any] = {}
            for name, value in form.multi_items():
                given = await value.read() if isinstance(value, UploadFile) else value
                _add(found, name, given)
            return found
    except (MultiPartException, UnicodeDecodeError, ValueError) as error:
        raise HTTPException(400, "the body is no form") from error


def _add(found: dict[str, Any], name: str, value: Any) -> None:
    """``name[]`` and a name that comes twice are lists; ``name[key]`` is a part of an object."""
    base, bracket, rest = name.partition("[")
    if bracket and rest.endswith("]") and rest != "]":
        part = found.setdefault(base, {})
        if isinstance(part, dict):
            part[rest[:-1]] = value
        return
    if bracket == "[" and rest == "]":
        found[base] = [*_listed(found.get(base)), value]
    elif base in found:
        found[base] = [*_listed(found[base]), value]
    else:
        found[base] = value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def videos_router(service: Service) -> APIRouter:
    """Return the routes of a server's videos."""
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    def shown(row: Any) -> Json:
        return Json(service.shown(row), headers={"openai-poll-after-ms": POLL_MS})

    @router.post(
        "",
        response_model=VideoBody,
        responses=_errors(400, 404, 408, 409, 413, 415, 422, 429),
        openapi_extra=_body(VideoFields, ("input_reference", "last_image")),
    )
    async def create_video(request: Request) -> Response:
        """Plan a video, and put it into the queue: what does not fit is refused at once."""
        asked = read_fields(VideoFields, await _given(request, service))
        assert isinstance(asked, VideoFields)
        return shown(await service.create(asked))

    @router.post(
        "/plan",
        response_model=PlanBody,
        responses=_errors(400, 404, 408, 409, 413, 415, 422),
        openapi_extra=_body(PlanFields),
    )
    async def plan_video(
        request: Request,
        alternatives: Annotated[bool, Query(description="How to have it sooner.")] = False,
    ) -> Response:
        """Return the bytes and seconds of a request, whether it fits, and what would. Nothing is
        queued."""
        asked = read_fields(PlanFields, await _given(request, service))
        return Json(await service.plan(asked, others=alternatives))

    @router.get("", response_model=ListBody, responses=_errors(422))
    async def list_videos(
        after: Annotated[str | None, Query(max_length=100)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        status: Literal["queued", "in_progress", "completed", "failed"] | None = None,
    ) -> Response:
        """Return the videos, the newest first."""
        page = service.queue.page(after, limit, order, status)
        data = service.shown_all(page.rows)
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return Json(
            {
                "object": "list",
                "data": data,
                "first_id": first,
                "last_id": last,
                "has_more": page.has_more,
            }
        )

    @router.get("/{video_id}", response_model=VideoBody, responses=_errors(404, 422))
    async def get_video(video_id: Id) -> Response:
        """Return one video, and how far it is."""
        return shown(service.row(video_id))

    @router.delete("/{video_id}", response_model=DeletedBody, responses=_errors(404, 422))
    async def delete_video(video_id: Id) -> Response:
        """Stop a video if it is being made, and remove all of it."""
        await service.delete(video_id)
        return Json({"id": video_id, "object": "video.deleted", "deleted": True})

    @router.get(
        "/{video_id}/content",
        response_class=FileResponse,
        responses=_binary("video/mp4", "image/jpeg") | _errors(404, 409, 422),
    )
    async def video_content(
        video_id: Id, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
    ) -> Response:
        """Return the finished mp4, whole or in ranges; or its first frame as a JPEG."""
        if variant == "spritesheet":
            raise NotFound("there are no spritesheets", expected="video or thumbnail")
        if variant == "thumbnail":
            picture = await service.frame(video_id, "first", ".jpg")
            return FileResponse(picture, media_type="image/jpeg")
        path = service.finished(video_id)
        return FileResponse(path, media_type="video/mp4", filename=f"{video_id}.mp4")

    @router.get(
        "/{video_id}/last_frame",
        response_class=FileResponse,
        responses=_binary("image/png") | _errors(404, 409, 422),
    )
    async def last_frame(video_id: Id) -> Response:
        """Return the last frame of a finished video, for the next one to start from."""
        picture = await service.frame(video_id, "last", ".png")
        return FileResponse(picture, media_type="image/png")

    @router.get(
        "/{video_id}/preview",
        response_class=Response,
        responses=_binary("image/jpeg") | _errors(404, 422),
    )
    async def preview(video_id: Id) -> Response:
        """Return the last preview of a video that is being made."""
        service.row(video_id)
        live = service.hub.live(video_id)
        if live is None or live.preview is None:
            raise NotFound("there is no preview yet")
        return Response(base64.b64decode(live.preview), media_type="image/jpeg")

    @router.get(
        "/{video_id}/input",
        response_class=FileResponse,
        responses=_binary("application/octet-stream", "image/png", "image/jpeg")
        | _errors(404, 422),
    )
    async def input_picture(video_id: Id) -> Response:
        """Return the picture that a video starts from."""
        service.row(video_id)
        path = service.folder(video_id) / IMAGE
        if not path.exists():
            raise NotFound("the video starts from no picture")
        return FileResponse(path, media_type=_kind(path.read_bytes()[:12]))

    @router.post("/{video_id}/cancel", response_model=VideoBody, responses=_errors(404, 409, 422))
    async def cancel_video(video_id: Id) -> Response:
        """Stop a video: it has failed as cancelled then, and can be resumed from its step."""
        return shown(await service.change(video_id, "cancel"))

    @router.post("/{video_id}/pause", response_model=VideoBody, responses=_errors(404, 409, 422))
    async def pause_video(video_id: Id) -> Response:
        """Let a video wait until it is resumed; one that is being made stops at its step."""
        return shown(await service.change(video_id, "pause"))

    @router.post("/{video_id}/resume", response_model=VideoBody, responses=_errors(404, 409, 422))
    async def resume_video(video_id: Id) -> Response:
        """Let a paused, cancelled or failed video go on from where it stood."""
        return shown(await service.change(video_id, "resume"))

    @router.post("/{video_id}/move", response_model=VideoBody, responses=_errors(404, 409, 422))
    async def move_video(
        video_id: Id, position: Annotated[int, Query(ge=0, le=1_000_000)]
    ) -> Response:
        """Give a waiting video another place: 0 is next."""
        return shown(await service.move(video_id, position))

    @router.get(
        "/{video_id}/events",
        response_class=EventSourceResponse,
        responses=_STREAM | _errors(404, 422),
    )
    async def video_events(video_id: Id) -> Response:
        """Return what happens to a video, as it happens, until it has ended."""
        service.row(video_id)
        return _events(_of_one(service, video_id))

    return router


async def _of_one(service: Service, name: str) -> AsyncIterator[Event]:
    with service.hub.subscribed(name) as subscription:
        row = service.row(name)
        now = Event("video", name, service.shown(row))
        yield now
        if _is_end(now):
            return
        async for event in subscription:
            yield event
            if _is_end(event):
                return


def _is_end(event: Event) -> bool:
    ended = event.name == "video" and event.data["status"] in (COMPLETED, FAILED)
    return ended or event.name == "deleted"


async def _of_all(service: Service, subscription: Subscription) -> AsyncIterator[Event]:
    yield Event("queue", None, service.queue_shown())
    async for event in subscription:
        yield event


def _events(events: AsyncIterator[Event]) -> EventSourceResponse:
    async def sent() -> AsyncIterator[ServerSentEvent]:
        number = 0
        async for event in events:
            number += 1
            yield ServerSentEvent(json.dumps(event.data), event=event.name, id=str(number))

    return EventSourceResponse(sent(), ping=_PING_S)


def control_router(service: Service) -> APIRouter:
    """Return the routes of a server's queue, its models and itself."""
    from penstock._version import __version__

    router = APIRouter(tags=["server"])

    @router.get("/v1/queue", response_model=QueueBody, responses=_errors())
    async def get_queue() -> Response:
        """Return which videos are being made, and which wait, the next one first."""
        return Json(service.queue_shown())

    @router.post("/v1/queue/pause", response_model=QueueBody, responses=_errors())
    async def pause_queue() -> Response:
        """Begin no further video; what is being made goes on."""
        await service.pause_all(True)
        return Json(service.queue_shown())

    @router.post("/v1/queue/resume", response_model=QueueBody, responses=_errors())
    async def resume_queue() -> Response:
        """Begin videos again."""
        await service.pause_all(False)
        return Json(service.queue_shown())

    @router.get(
        "/v1/events",
        response_class=EventSourceResponse,
        responses=_STREAM | _errors(),
    )
    async def all_events() -> Response:
        """Return what happens to all videos and to the queue, as it happens."""

        async def events() -> AsyncIterator[Event]:
            with service.hub.subscribed() as subscription:
                async for event in _of_all(service, subscription):
                    yield event

        return _events(events())

    @router.get("/v1/models", response_model=ModelsBody, responses=_errors())
    async def models() -> Response:
        """Return the models that may be asked for, and their defaults; the first one is the
        default."""
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "penstock", **about}
            for name, about in service.about.items()
        ]
        return Json({"object": "list", "data": data})

    @router.get("/v1/loras", response_model=ModelsBody, responses=_errors())
    async def loras() -> Response:
        """Return the LoRAs that may be named."""
        data = [{"id": name, "object": "lora"} for name in service.loras()]
        return Json({"object": "list", "data": data})

    @router.get("/health", response_model=HealthBody, responses=_errors())
    async def health() -> Response:
        """Return that the server is up; no key is needed."""
        return Json({"status": "ok", "version": __version__})

    return router


def _kind(head: bytes) -> str:
    """Return a picture's media type by its first bytes: a browser is told nothing that it could
    run."""
    if head.startswith(b"\x89PNG"):
        return "image/png"
    if head.startswith(b"\xff\xd8"):
        return "image/jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    return "application/octet-stream"
