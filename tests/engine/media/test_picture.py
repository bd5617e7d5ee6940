"""Decoding takes what the header said, whatever the format; and the pixels are the same."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from penstock.engine.media.picture import MAX_ASPECT, measure, open_image
from penstock.errors import ImageError
from penstock.units import MIB

SIZE = (2000, 1500)


def smooth(mode):
    """Neither noise nor flat: compresses as photographs do."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    bands = [
        (x // 8 + 31 * band + y // 6) % 256
        for band in range(len(Image.new(mode, (1, 1)).getbands()))
    ]
    pixels = np.stack(bands, -1).astype(np.uint8)
    return Image.frombytes(mode, SIZE, pixels.squeeze().tobytes())


def grey16():
    x, y = np.meshgrid(np.arange(SIZE[0], dtype=np.uint16), np.arange(SIZE[1], dtype=np.uint16))
    return Image.fromarray(x * 29 + y * 13)


def rgb16(path):
    """A PNG of 16 bits a channel, which Pillow reads and does not write."""
    row = b"\0" + bytes(range(250)) * (SIZE[0] * 6 // 250)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0)
    body = zlib.compress(row * SIZE[1])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def turned(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


CASES = {
    "png rgb": lambda path: smooth("RGB").save(path, "PNG"),
    "png rgba": lambda path: smooth("RGBA").save(path, "PNG"),
    "png grey": lambda path: smooth("L").save(path, "PNG"),
    "png grey alpha": lambda path: smooth("LA").save(path, "PNG"),
    "png palette": lambda path: smooth("RGB").quantize(64).save(path, "PNG", transparency=3),
    "png bits": lambda path: smooth("L").convert("1").save(path, "PNG"),
    "png grey 16": lambda path: grey16().save(path, "PNG"),
    "png rgb 16": rgb16,
    "jpeg": lambda path: smooth("RGB").save(path, "JPEG"),
    "jpeg turned": lambda path: smooth("RGB").save(path, "JPEG", **turned(None)),
    "jpeg progressive": lambda path: smooth("RGB").save(
        path, "JPEG", progressive=True, subsampling=0
    ),
    "jpeg cmyk": lambda path: smooth("CMYK").save(path, "JPEG", progressive=True),
    "gif": lambda path: smooth("RGB").save(path, "GIF"),
    "bmp": lambda path: smooth("RGB").save(path, "BMP"),
    "tiff": lambda path: smooth("RGB").save(path, "TIFF"),
    "tiff lzw": lambda path: smooth("RGBA").save(path, "TIFF", compression="tiff_lzw"),
    "webp": lambda path: smooth("RGB").save(path, "WEBP"),
    "webp alpha": lambda path: smooth("RGBA").save(path, "WEBP", lossless=True),
    "avif": lambda path: smooth("RGB").save(path, "AVIF"),
}

PEAK = """
import sys
from pathlib import Path
from PIL import Image, features
from penstock.engine.media.picture import measure, open_image
path = Path(sys.argv[1])
open_image(Path(sys.argv[2]))  # the codec and its tables are loaded
said = measure(path)
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
before = status("VmRSS")
picture = open_image(path)
assert picture.size == (said.width, said.height)
print(said.decode_bytes, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak as Linux tells it")
@pytest.mark.parametrize("case", CASES)
def test_decoding_takes_no_more_than_was_said(tmp_path, case):
    if case == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path, small = tmp_path / "large", tmp_path / "small"
    CASES[case](path)
    Image.new("RGB", (8, 8)).save(small, case.split()[0].upper())
    done = subprocess.run(
        [sys.executable, "-c", PEAK, path, small], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said, taken = map(int, done.stdout.split())
    print(f"{case}: said {said / MIB:.1f}, took {taken / MIB:.1f} MiB")
    assert taken <= said
    # Measured, not guessed: the bands and tables aside, no more than a decoder may buffer
    assert said - 25 * MIB <= 28 * SIZE[0] * SIZE[1]


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "P", "RGB with a key"])
def test_bands_change_nothing(tmp_path, mode):
    """As converted at once, as before there were bands."""
    path = tmp_path / "a.png"
    if mode == "I;16":
        grey16().save(path)
        with Image.open(path) as whole:
            grey = (np.asarray(whole).astype(np.float64) / 257.0).round().clip(0, 255)
        wanted = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    else:
        options = {"P": {"transparency": 5}, "RGB with a key": {"transparency": (3, 34, 65)}}
        picture = smooth("RGB").quantize(32) if mode == "P" else smooth(mode.split()[0])
        picture.save(path, **options.get(mode, {}))
        with Image.open(path) as whole:
            layer = whole.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        wanted = Image.alpha_composite(white, layer).convert("RGB")
    assert open_image(path).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_pillows(tmp_path, orientation):
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.frombytes("RGB", (5, 3), bytes(range(45)))
    picture.save(path, exif=exif)
    with Image.open(path) as whole:
        wanted = ImageOps.exif_transpose(whole)
    assert open_image(path).tobytes() == wanted.tobytes()
    assert (measure(path).width, measure(path).height) == wanted.size


def test_the_header_alone_is_measured(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    smooth("RGB").save(path)
    path.write_bytes(path.read_bytes()[:400])
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert measure(path).width == SIZE[0]


def test_a_narrow_picture_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (MAX_ASPECT * 4, 4)).save(path)
    assert open_image(path).size == (400, 4)
    Image.new("RGB", (MAX_ASPECT * 4 + 1, 4)).save(path)
    for look in (open_image, measure):
        with pytest.raises(ImageError, match="too narrow"):
            look(path)


def test_bytes_of_no_picture_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(io.BytesIO(b"\x89PNG\r\n\x1a\n").getvalue())
    with pytest.raises(ImageError):
        measure(tmp_path / "a.png")
