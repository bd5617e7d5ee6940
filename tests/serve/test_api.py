"""What the routes promise, against a server whose worker does as it is told."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from penstock.engine.media.video import write_video
from penstock.engine.request.demo import demo_picture
from penstock.serve.child import Died
from penstock.serve.settings import Limits
from tests.serve.inside import Inside, Scripted

BIG = {"size": "512x512", "num_frames": "81"}
"""What does not fit 64 MiB."""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "made.mp4"
    frames = (np.full((32, 32, 3), 40 * index, np.uint8) for index in range(5))
    write_video(path, frames, fps=8)
    return path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, video: Path) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "loras").mkdir()
    (folder / "loras" / "soft.safetensors").write_bytes(b"no weights")
    limits = Limits(waiting=4, body_bytes=1 << 20)
    server = Inside(
        folder / "own", Scripted(video), limits=limits, lora_folders=(folder / "loras",)
    )
    yield server
    server.close()


@pytest.fixture
def server(running: Inside) -> Iterator[Inside]:
    yield running
    running.client.post("/v1/queue/resume")
    running.empty()


@pytest.fixture
def still(server: Inside) -> Inside:
    """A server whose queue is paused."""
    assert server.client.post("/v1/queue/pause").json()["paused"] is True
    return server


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])


def test_what_fits_is_told_in_bytes_and_seconds(server: Inside) -> None:
    plan = server.client.post("/v1/videos/plan", json={"seconds": 1, "size": "32x32"}).json()
    assert plan["fits"] is True
    assert 0 < plan["vram_bytes"] <= plan["vram_limit_bytes"] == 64 << 20
    assert 0 < plan["ram_bytes"] <= plan["ram_limit_bytes"] == 128 << 20
    assert plan["seconds"] == pytest.approx(sum(each["seconds"] for each in plan["phases"]))
    assert (plan["settings"]["frames"], plan["video_seconds"]) == (9, "1.125")


def test_null_and_empty_fields_are_gaps(server: Inside) -> None:
    """A client that fills in a form of all fields sends these."""
    names = server.client.get("/openapi.json").json()["paths"]["/v1/videos/plan"]["post"]
    fields = names["requestBody"]["content"]["application/json"]["schema"]["properties"]
    gaps = {name: None for name in fields if name != "prompt"}
    assert server.client.post("/v1/videos/plan", json=gaps).json()["fits"] is True
    form = dict.fromkeys(fields, "")
    assert server.client.post("/v1/videos/plan", data=form).json()["fits"] is True


def test_what_does_not_fit_is_refused_with_the_arithmetic_and_what_would(server: Inside) -> None:
    told = error(server.post(**BIG), 422)
    problem = told["plan"]["problem"]
    assert told["code"] == problem["code"] == "over_budget"
    assert problem["need_bytes"] > problem["limit_bytes"]
    assert problem["consumers"]
    assert server.client.get("/v1/videos").json()["data"] == []
    assert list((server.folder / "jobs").iterdir()) == []
    nearest = told["plan"]["nearest"]
    assert server.client.post("/v1/videos/plan", json=BIG).json()["nearest"] == nearest
    assert server.client.post("/v1/videos/plan", json=nearest).json()["fits"] is True
    server.create(**nearest)


@pytest.mark.parametrize(
    ("said", "status", "found"),
    [
        ({"num_frames": "6"}, 422, "frames"),
        ({"size": "33x32"}, 422, "width"),
        ({"seconds": "nan", "num_frames": None}, 422, "seconds"),
        ({"num_inference_steps": "many"}, 422, "num_inference_steps"),
        ({"seed": "-5"}, 422, "seed"),
        ({"width": "32"}, 422, "width and height must be given together"),
        ({"width": "48", "height": "48"}, 422, "size cannot be combined with width and height"),
        ({"n": "2"}, 422, "one video"),
        ({"guidance_scale_2": "3"}, 422, "guidance_scale_2"),
        ({"enable_frame_interpolation": "true"}, 422, "enable_frame_interpolation"),
        ({"cache": "most"}, 422, "cache"),
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": "   "}, 422, "prompt"),
        ({"sampler": "ddim"}, 422, "sampler"),
        ({"model": "other"}, 404, "mini"),
        ({"lora": "hard"}, 404, "LoRA"),
        ({"lora": "soft:much"}, 422, "LoRA"),
        (
            {"continue_from": "video_000000000000000000000000"},
            422,
            "input_reference and continue_from cannot be used together",
        ),
    ],
)
def test_an_illegal_value_is_named(
    server: Inside, said: dict[str, Any], status: int, found: str
) -> None:
    assert found in error(server.post(**said), status)["message"]
    assert list((server.folder / "jobs").iterdir()) == []


def test_what_other_servers_take_and_means_nothing_here_is_taken(still: Inside) -> None:
    still.create(user="somebody", quality="standard", enable_teacache="false", n="1")


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"a video, please", 415),
        ("application/json", b"{", 400),
        ("application/json", b"[]", 400),
        ("application/json", b"[" * 100_000, 400),
        ("application/json", b'{"prompt": "\\ud800"}', 422),
        ("multipart/form-data; boundary=x", b"--x\r\nno form", 400),
        ("multipart/form-data", b"", 400),
        ("application/x-www-form-urlencoded", b"&".join(b"a%d=1" % i for i in range(200)), 400),
    ],
)
def test_a_body_that_is_none_is_refused(
    server: Inside, kind: str, body: bytes, status: int
) -> None:
    for path in ("/v1/videos", "/v1/videos/plan"):
        answer = server.client.post(path, content=body, headers={"content-type": kind})
        error(answer, status)


@pytest.mark.parametrize("shape", ["base64", "data", "image_url", "image_reference"])
def test_a_picture_may_come_in_json(still: Inside, shape: str) -> None:
    picture = demo_picture().read_bytes()
    text = base64.b64encode(picture).decode()
    address = f"data:image/png;base64,{text}"
    sent: dict[str, Any] = {
        "base64": {"input_reference": text},
        "data": {"input_reference": address},
        "image_url": {"input_reference": {"image_url": address}},
        "image_reference": {"image_reference": {"image_url": address}},
    }[shape]
    body = {"prompt": "it moves", "size": "32x32", "num_frames": 5, **sent}
    answer = still.client.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    found = still.client.get(f"/v1/videos/{answer.json()['id']}/input")
    assert (found.content, found.headers["content-type"]) == (picture, "image/png")


@pytest.mark.parametrize(
    ("picture", "found"),
    [
        ("http://127.0.0.1:1/a.png", "--allow-urls"),
        ("no base64 at all", "input_reference"),
        (base64.b64encode(b"no picture").decode(), "picture"),
        (base64.b64encode(demo_picture().read_bytes()[:200]).decode(), "damaged"),
        (17, "input_reference"),
    ],
)
def test_what_is_no_picture_is_refused(server: Inside, picture: Any, found: str) -> None:
    body = {"prompt": "it moves", "size": "32x32", "input_reference": picture}
    told = error(server.client.post("/v1/videos", json=body), 422)
    assert found in told["message"]
    assert str(server.folder) not in json.dumps(told)


def test_pages_of_the_list(still: Inside) -> None:
    names = [still.create() for _ in range(3)]
    first = still.client.get("/v1/videos", params={"limit": 2, "order": "asc"}).json()
    assert (first["first_id"], first["last_id"], first["has_more"]) == (*names[:2], True)
    rest = still.client.get("/v1/videos", params={"after": names[1], "order": "asc"}).json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (names[2:], False)
    newest = still.client.get("/v1/videos").json()["data"]
    assert [each["id"] for each in newest] == names[::-1]
    assert still.client.get("/v1/videos", params={"status": "completed"}).json()["data"] == []
    error(still.client.get("/v1/videos", params={"limit": 0}), 422)


def test_a_waiting_video_is_moved_paused_and_cancelled(still: Inside) -> None:
    names = [still.create() for _ in range(3)]
    assert still.get(names[2])["position"] == 2
    assert still.do(names[2], "move", position=0).json()["position"] == 0
    assert still.client.get("/v1/queue").json()["waiting"] == [names[2], names[0], names[1]]
    assert still.do(names[2], "pause").json()["paused"] is True
    cancelled = still.do(names[0], "cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    error(still.do(names[0], "cancel"), 409)
    error(still.do(names[0], "move", position=1), 409)
    assert still.do(names[0], "resume").json()["status"] == "queued"
    still.client.post("/v1/queue/resume")
    still.until(names[0], status="in_progress")  # its own place again, and before it a paused one
    assert still.get(names[2])["status"] == "queued"


def test_events_of_a_job_from_its_beginning_to_its_end(server: Inside) -> None:
    name = server.create()
    server.worker.has_begun(name)
    preview = server.client.get(f"/v1/videos/{name}/preview")
    assert (preview.content[:2], preview.headers["content-type"]) == (b"\xff\xd8", "image/jpeg")
    now = server.get(name)
    assert (now["status"], now["progress"], now["step"], now["eta_s"]) == (
        "in_progress",
        40,
        1,
        3.0,
    )
    assert now["used"] == {"vram_bytes": 5, "ram_bytes": 6}
    error(server.client.get(f"/v1/videos/{name}/content"), 409)
    seen = []
    with server.client.stream("GET", f"/v1/videos/{name}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                seen.append(line[7:])
            if line.startswith("data: ") and len(seen) == 1:
                server.worker.complete()
            if line.startswith("data: "):
                last = json.loads(line[6:])
    assert seen == ["video", "video"]
    assert (last["status"], last["progress"]) == ("completed", 100)


def test_progress_and_previews_are_events(server: Inside) -> None:
    with server.client.stream("GET", "/v1/events") as answer:
        lines = answer.iter_lines()
        assert next(lines) == "id: 1"
        name = server.create()
        events: dict[str, Any] = {}
        for line in lines:
            if line.startswith("event: "):
                kind = line[7:]
            if line.startswith("data: "):
                events[kind] = json.loads(line[6:])
            if "progress" in events:
                break
    assert events["notice"] == {"id": name, "message": "begun"}
    assert events["progress"]["preview"].startswith("data:image/jpeg;base64,/9j/")
    assert events["video"]["status"] == "in_progress"
    assert events["queue"]["running"] == [name]


def test_a_finished_video_is_had_whole_in_parts_and_as_pictures(
    server: Inside, video: Path
) -> None:
    name = server.create()
    server.worker.has_begun(name)
    server.worker.complete()
    server.until(name, status="completed")
    path = f"/v1/videos/{name}"
    whole = server.client.get(f"{path}/content")
    assert (whole.content, whole.headers["content-type"]) == (video.read_bytes(), "video/mp4")
    part = server.client.get(f"{path}/content", headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    thumbnail = server.client.get(f"{path}/content", params={"variant": "thumbnail"})
    assert thumbnail.content[:2] == b"\xff\xd8"
    assert server.client.get(f"{path}/last_frame").content[:4] == b"\x89PNG"
    error(server.client.get(f"{path}/content", params={"variant": "spritesheet"}), 404)
    server.client.post("/v1/queue/pause")
    answer = server.client.post(
        "/v1/videos", json={"prompt": "it goes on", "continue_from": name, "num_frames": 5}
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["remixed_from_video_id"] == name
    assert answer.json()["size"] == "32x32"


@pytest.mark.parametrize("what", ["pause", "cancel", "delete"])
def test_a_running_video_stops_and_becomes_what_was_asked(server: Inside, what: str) -> None:
    name = server.create()
    server.worker.has_begun(name)
    if what == "delete":
        gone = server.client.delete(f"/v1/videos/{name}")
        assert gone.json() == {"id": name, "object": "video.deleted", "deleted": True}
        assert not (server.folder / "jobs" / name).exists()
        error(server.client.get(f"/v1/videos/{name}"), 404)
        error(server.client.delete(f"/v1/videos/{name}"), 404)
        return
    server.until(name, progress=40)
    server.do(name, what)
    state = "failed" if what == "cancel" else "queued"
    now = server.until(name, status=state)
    assert (now["paused"], now["progress"]) == (what == "pause", 40)
    assert server.do(name, "resume").json()["progress"] == 40
    server.until(name, status="in_progress")


def test_a_worker_that_dies_is_followed_by_another_but_not_for_ever(server: Inside) -> None:
    name = server.create()
    for _ in range(3):
        server.worker.has_begun(name)
        server.worker.end(Died("was ended by signal 9"))
    now = server.until(name, status="failed")
    assert now["error"]["code"] == "worker_died"
    assert "signal 9" in now["error"]["message"]
    assert server.worker.begun.empty()


def test_what_a_job_fails_of_is_told(server: Inside) -> None:
    name = server.create()
    server.worker.has_begun(name)
    server.worker.end({"state": "failed", "error": {"code": "non_finite", "message": "NaN"}})
    now = server.until(name, status="failed")
    assert now["error"] == {"code": "non_finite", "message": "NaN"}


def test_the_quota_of_waiting_videos(still: Inside) -> None:
    for _ in range(4):
        still.create()
    assert error(still.post(), 429)["code"] == "quota_exceeded"


def test_models_loras_health_and_metrics(server: Inside) -> None:
    models = server.client.get("/v1/models").json()["data"]
    assert [(each["id"], each["image"], each["device"]) for each in models] == [
        ("mini", "must", "cpu")
    ]
    assert models[0]["defaults"]["num_frames"] == 17
    assert [each["id"] for each in server.client.get("/v1/loras").json()["data"]] == ["soft"]
    assert server.client.get("/health").json()["status"] == "ok"
    text = server.client.get("/metrics").text
    assert re.search(r'^penstock_videos\{kind="queued"\} 0\.0$', text, re.MULTILINE)
    assert 'route="/health",status="200"' in text


def test_the_page_of_the_api_asks_no_other_host(server: Inside) -> None:
    page = server.client.get("/docs")
    assert "POST /v1/videos/plan" in page.text
    assert re.findall(r"(?:src|href)=['\"]?([^'\" >]+)", page.text) == ["/openapi.json"]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    paths = server.client.get("/openapi.json").json()["paths"]
    assert "/v1/videos/{video_id}/content" in paths
