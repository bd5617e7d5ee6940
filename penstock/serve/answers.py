"""Answers in JSON, and errors as clients see them: no trace, no path of the server's."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from penstock.errors import PenstockError, StorageError
from penstock.serve.fields import IllegalField
from penstock.serve.guard import BodyRefused
from penstock.serve.schemas import ErrorBody
from penstock.serve.service import DoesNotFit, NotFound, NotNow, Refused, TooMuch

log = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[PenstockError], int], ...] = (
    (NotFound, 404), (NotNow, 409), (TooMuch, 429), (StorageError, 507),
)  # fmt: skip

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": told}
    for status, told in {
        400: "A body that is no form and no JSON.",
        401: "The key is missing or wrong.",
        403: "From a page of another site.",
        404: "There is no such thing.",
        408: "The body came too slowly.",
        409: "Its state does not allow that.",
        413: "The body is too large.",
        415: "Neither a form nor JSON.",
        421: "The server is not called by that name.",
        422: "A value is illegal, or the video does not fit: with the arithmetic.",
        429: "A quota is used up.",
    }.items()
}


class Json(Response):
    """Plain values; text of any kind survives, as what is not ASCII is escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """As bytes."""
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def refused(status: int, code: str, message: str, **more: Any) -> Json:
    """Return the schema of an error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    told = {"code": code, "message": message, "type": kind, "param": None} | more
    return Json({"error": told}, status)


def answer_errors(app: FastAPI) -> None:
    """Let every error be answered as one of ours."""

    @app.exception_handler(PenstockError)
    def _penstock(request: Request, error: PenstockError) -> Json:
        return _told(error)

    @app.exception_handler(BodyRefused)
    def _body(request: Request, error: BodyRefused) -> Json:
        answer = refused(error.status, error.code, str(error))
        answer.headers["connection"] = "close"
        return answer

    @app.exception_handler(RequestValidationError)
    def _illegal(request: Request, error: RequestValidationError) -> Json:
        first = error.errors()[0]
        name = ".".join(str(each) for each in first["loc"][1:]) or "the request"
        return refused(422, "request", f"{name}: {first['msg']}", param=name)

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> Json:
        codes = {404: "not_found", 405: "method_not_allowed"}
        answer = refused(error.status_code, codes.get(error.status_code, "request"), error.detail)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    def _bug(request: Request, error: Exception) -> Json:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        return refused(500, "internal", "The server has failed; its log says why.")


def _told(error: PenstockError) -> Json:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 422)
    if isinstance(error, Refused):
        told = error.told
        if told["code"] == "internal":
            return refused(500, "internal", "The server has failed; its log says why.")
        more = {name: told.get(name) for name in ("expected", "found", "remedy")}
        return refused(status, told["code"], told["message"], **more)
    more = {"expected": error.expected, "found": error.found, "remedy": error.remedy}
    if isinstance(error, DoesNotFit):
        more["plan"] = error.plan
    if isinstance(error, IllegalField):
        more["param"] = error.name
    return refused(status, error.code, str(error), **more)
