"""What hostile pages and clients get: a row each of the table in docs/server.md."""

from __future__ import annotations

import asyncio
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.media.picture import open_image
from penstock.engine.request.demo import demo_picture
from penstock.errors import UsageError
from penstock.serve.hub import MOST_PENDING, Event, Hub
from penstock.serve.launch import bound
from penstock.serve.settings import Limits, ServeSettings, named_models
from tests.serve.inside import Inside, Scripted

KEY = "a key that nobody guesses"
LIMITS = Limits(body_bytes=1 << 20, pixels=1_000_000, connections=24, header_s=0.3, body_s=0.3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "video.mp4").write_bytes(bytes(16 << 20))
    (folder / "secret.safetensors").write_bytes(b"secret")
    (folder / "loras").mkdir()
    running = Inside(
        folder / "own",
        Scripted(folder / "video.mp4"),
        limits=LIMITS,
        lora_folders=(folder / "loras",),
    )
    yield running
    running.close()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("locked")
    running = Inside(folder / "own", Scripted(folder / "none"), api_key=KEY)
    yield running
    running.close()


def raw(server: Inside, sent: bytes) -> bytes:
    """What a connection that sends so much, and then waits, is answered until it is closed."""
    with socket.create_connection(server.address) as connection:
        connection.sendall(sent)
        return drained(connection)


def drained(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(1 << 16):
            found += part
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "",
        "127.0.0.1@evil.example",
        "[",
    ],
)
def test_rebinding_another_name_is_not_answered(server: Inside, host: str) -> None:
    answer = server.client.get("/v1/videos", headers={"host": host})
    assert answer.status_code in (400, 421), answer.text
    assert "data" not in answer.text


def test_rebinding_two_hosts_or_none_are_not_answered(server: Inside) -> None:
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n"
    assert raw(server, two).startswith(b"HTTP/1.1 400")
    assert b" 421 " in raw(server, b"GET /health HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:8730"])
def test_its_own_names_are_answered(server: Inside, host: str) -> None:
    assert server.client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://localhost.evil.example"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
    ],
)
def test_cross_origin_nothing_is_done_and_nothing_is_shown(
    server: Inside, headers: dict[str, str]
) -> None:
    for method in ("GET", "POST"):
        answer = server.client.request(method, "/v1/videos", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_refused")
        assert "access-control-allow-origin" not in answer.headers


def test_cross_origin_a_form_of_another_site_cannot_navigate_into_a_change(server: Inside) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert server.client.post("/v1/queue/pause", headers=headers).status_code == 403
    assert server.client.get("/docs", headers=headers).status_code == 200


def test_its_own_page_is_answered(server: Inside) -> None:
    headers = {"origin": server.url, "sec-fetch-site": "same-origin"}
    assert server.client.get("/v1/videos", headers=headers).status_code == 200


def test_without_the_key_nothing_but_health_is_answered(locked: Inside) -> None:
    assert locked.client.get("/health").status_code == 200
    wrong = [
        {},
        {"authorization": "Bearer no"},
        {"authorization": KEY},
        {"cookie": "penstock_key=x"},
    ]
    for headers in wrong:
        for path in ("/v1/videos", "/metrics", "/docs", "/openapi.json", "/none"):
            answer = locked.client.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    for headers in ({"authorization": f"Bearer {KEY}"}, {"cookie": f'penstock_key="{KEY}"'}):
        assert locked.client.get("/v1/videos", headers=headers).status_code == 200


def test_others_than_this_machine_are_served_with_a_key_only(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.1.2", "::", "some.name"):
        with pytest.raises(UsageError, match="--api-key"):
            ServeSettings(models={"mini": "x"}, folder=tmp_path, host=host)
    ServeSettings(models={"mini": "x"}, folder=tmp_path, host="0.0.0.0", api_key=KEY)


@pytest.mark.parametrize("name", ["file", "nowhere"])
def test_a_folder_of_loras_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"{name} holds no LoRAs"):
        ServeSettings(models={"mini": "x"}, folder=tmp_path, lora_folders=(tmp_path / name,))
    ServeSettings(models={"mini": "x"}, folder=tmp_path, lora_folders=(tmp_path,))


@pytest.mark.parametrize(
    "name",
    [
        "../queue.sqlite", "..%2f..%2fqueue.sqlite", "%2e%2e", "..", "video_0/../../lock",
        "video_000000000000000000000000%00", "/etc/passwd", "%2fetc%2fpasswd", "video_" + "0" * 24,
    ],
)  # fmt: skip
def test_traversal_an_id_is_no_path(server: Inside, name: str) -> None:
    for path in (f"/v1/videos/{name}/content", f"/v1/videos/{name}/input", f"/v1/videos/{name}"):
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answer = raw(server, head.encode())
        assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 422")), answer


@pytest.mark.parametrize(
    "said",
    [
        {"lora": "../secret"}, {"lora": "/etc/passwd"}, {"model": "../own"}, {"model": "/"},
        {"continue_from": "../../video", "input_reference": ""},
    ],
)  # fmt: skip
def test_traversal_a_name_is_one_of_a_list(server: Inside, said: dict[str, Any]) -> None:
    body = {"prompt": "it moves", "size": "32x32", "num_frames": 5, **said}
    answer = server.client.post("/v1/videos", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_traversal_the_name_of_an_upload_is_not_used(server: Inside) -> None:
    server.client.post("/v1/queue/pause")
    files = {"input_reference": ("../../../evil.png", demo_picture().read_bytes(), "image/png")}
    data = {"prompt": "it moves", "size": "32x32", "num_frames": "5"}
    name = server.client.post("/v1/videos", data=data, files=files).json()["id"]
    kept = server.folder / "jobs" / name
    assert [path.name for path in kept.iterdir()] == ["image"]
    assert not list(server.folder.parent.rglob("*evil*"))
    server.client.delete(f"/v1/videos/{name}")
    server.client.post("/v1/queue/resume")


@pytest.mark.parametrize("said", ["its length", "chunks", "no number"])
def test_an_upload_that_is_too_large_is_not_read(server: Inside, said: str) -> None:
    head = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = {
        "its length": b"Content-Length: 99999999999\r\n\r\n",
        "no number": b"Content-Length: 1e9\r\n\r\n",
        "chunks": b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n%b\r\n" % bytes(1 << 16) * 17,
    }[said]
    status = b" 400 " if said == "no number" else b" 413 "
    assert status in raw(server, head + body).partition(b"\r\n")[0]
    assert list((server.folder / "jobs").iterdir()) == []


def bomb(width: int, height: int, rows: int) -> bytes:
    """A PNG that says a size, and holds so many rows of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 + 3 * width) * rows)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height", "rows"), [(60_000, 60_000, 1), (4000, 4000, 4000), (1, 1_000_000, 1)]
)
def test_a_decompression_bomb_is_refused_by_its_header(
    server: Inside, tmp_path: Path, width: int, height: int, rows: int
) -> None:
    picture = bomb(width, height, rows)
    assert len(picture) < LIMITS.body_bytes
    files = {"input_reference": ("a.png", picture, "image/png")}
    data = {"prompt": "it moves", "size": "32x32", "num_frames": "5"}
    answer = server.client.post("/v1/videos", data=data, files=files)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "image")
    assert list((server.folder / "jobs").iterdir()) == []


def test_the_bomb_is_a_picture_where_it_is_small(tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    path.write_bytes(bomb(40, 30, 30))
    assert open_image(path).size == (40, 30)


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_slow_client_does_not_keep_a_connection_without_headers(
    server: Inside, sent: bytes
) -> None:
    assert raw(server, sent) == b""


def test_a_slow_client_does_not_keep_a_connection_after_a_request(server: Inside) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = raw(server, request + b"GET /hea")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_slow_body_is_not_waited_for(server: Inside) -> None:
    head = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = raw(server, head + b"Content-Length: 1000\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_loses_its_connection(server: Inside) -> None:
    name = server.create()
    server.worker.has_begun(name)
    server.worker.complete()
    server.until(name, status="completed")
    whole = server.worker.video.stat().st_size
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        connection.sendall(
            f"GET /v1/videos/{name}/content HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
        )
        begun = connection.recv(1)  # it is counted by now
        until_closed(server)
        assert len(begun + drained(connection)) < whole
    assert len(server.client.get(f"/v1/videos/{name}/content").content) == whole
    server.client.delete(f"/v1/videos/{name}")


def until_closed(server: Inside) -> None:
    """Until no connection is left but the one that asks."""
    while True:
        text = server.client.get("/metrics").text
        found = next(line for line in text.splitlines() if line.startswith("penstock_connections "))
        if float(found.split()[1]) <= 1:
            return


def test_a_flood_of_headers_is_cut(server: Inside) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    many = b"".join(b"X-%d: %b\r\n" % (index, bytes([97]) * 100) for index in range(1000))
    assert raw(server, head + many).startswith(b"HTTP/1.1 400")
    assert raw(server, b"GET /" + b"a" * 100_000).startswith(b"HTTP/1.1 400")
    assert server.client.get("/health").status_code == 200


def test_a_flood_of_connections_leaves_the_server_answering(server: Inside) -> None:
    idle = [socket.create_connection(server.address) for _ in range(2 * LIMITS.connections)]
    for connection in idle:
        assert drained(connection) == b""  # each is closed in its turn: nothing came
        connection.close()
    assert server.client.get("/health").status_code == 200


def test_answers_do_not_wait_for_the_client_to_acknowledge_their_first_part(tmp_path: Path) -> None:
    """asyncio turns Nagle's algorithm off where it sees that a socket is TCP's."""

    class Seen(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            ours = transport.get_extra_info("socket")
            seen.set_result(ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    async def connected() -> int:
        nonlocal seen
        seen = asyncio.get_running_loop().create_future()
        with bound(ServeSettings(models={"mini": "x"}, folder=tmp_path, port=0)) as listener:
            listener.setblocking(False)
            server = await asyncio.get_running_loop().create_server(Seen, sock=listener)
            _, writer = await asyncio.open_connection(*listener.getsockname())
            found = await seen
            writer.close()
            server.close()
            return int(found)

    seen: asyncio.Future[int]
    assert asyncio.run(connected()) == 1


def test_no_trace_is_shown(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("a secret of the server's")

    monkeypatch.setattr(server.service, "row", broken)
    answer = server.client.get("/v1/videos/video_0")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_a_reader_that_sleeps_loses_progress_and_keeps_the_end() -> None:
    async def slept() -> list[Event]:
        hub = Hub()
        with hub.subscribed("a") as subscription:
            for index in range(100 * MOST_PENDING):
                hub.progress("a", {"event": "progress", "step": index, "preview": None})
                hub.publish(Event("video", "b", {}))
            hub.publish(Event("video", "a", {"status": "completed"}))
            hub.close()
            return [event async for event in subscription]

    seen = asyncio.run(slept())
    assert len(seen) <= MOST_PENDING + 1
    assert seen[-1] == Event("video", "a", {"status": "completed"})
    assert {event.video for event in seen} == {"a"}


def test_models_by_name(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    assert named_models([str(tmp_path / "own"), "b=/c"]) == {
        "own": str(tmp_path / "own"),
        "b": "/c",
    }
    for wrong in (["a=1", "a=2"], ["=x"]):
        with pytest.raises(UsageError):
            named_models(wrong)
