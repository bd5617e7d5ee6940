"""The real client of OpenAI's package against a real server, from asking to deleting."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.engine.engine import Engine
from penstock.engine.media.video import read_frames
from penstock.engine.request.demo import MINI, demo_picture
from penstock.engine.request.settings import Settings, resolve
from tests.serve.running import Running

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("serve"))
    yield running
    running.close()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client


def test_from_asking_to_deleting(server: Running, client: openai.OpenAI, tmp_path: Path) -> None:
    assert [model.id for model in client.models.list()] == ["mini"]
    asked = client.videos.create(
        prompt="a green square moves to the right",
        model="mini",
        size="32x32",
        seconds="1",
        input_reference=demo_picture(),
        extra_body={"num_inference_steps": 2, "seed": 7},
    )
    assert (asked.status, asked.size, asked.object) == ("queued", "32x32", "video")
    done = client.videos.poll(asked.id, poll_interval_ms=50)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.seconds == "1.125"  # 9 frames: the nearest to a second that the model can make
    path = tmp_path / "video.mp4"
    client.videos.download_content(asked.id).write_to_file(path)
    assert _frames(path) == _made(tmp_path, frames=9)
    assert client.videos.download_content(asked.id, variant="thumbnail").read()[:2] == b"\xff\xd8"
    assert [video.id for video in client.videos.list(limit=1, order="asc")] == [asked.id]
    gone = client.videos.delete(asked.id)
    assert (gone.id, gone.deleted, gone.object) == (asked.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError, match="no such video"):
        client.videos.retrieve(asked.id)
    assert list((server.folder / "jobs").iterdir()) == []


def _frames(path: Path) -> list[bytes]:
    return [frame.tobytes() for frame in read_frames(path)]


def _made(folder: Path, frames: int) -> list[bytes]:
    """What the engine makes of the same request, without a server."""
    settings = Settings(
        prompt="a green square moves to the right",
        size="32x32",
        frames=frames,
        steps=2,
        seed=7,
        image=demo_picture(),
    )
    output = folder / "own.mp4"
    with Engine.open(MINI, vram="256MiB", ram="512MiB", device="cpu") as engine:
        engine.submit(resolve(settings, engine.model), output).result()
    return _frames(output)
