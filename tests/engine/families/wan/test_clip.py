import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils import load_image
from diffusers.video_processor import VideoProcessor
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from penstock.engine.families.wan import clip
from penstock.engine.families.wan.clip import (
    conditioning,
    embed_pixels,
    encode_layers,
    make_image_processor,
    pixel_values,
    preprocess,
    squashed_values,
)
from penstock.engine.families.wan.structure import layers_needed
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.media.picture import MAX_PIXELS, open_image, to_rgb
from penstock.errors import CheckpointError, ImageError
from tests.versions import bare_clip


def noise_picture(size=(60, 40), mode="RGB", seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return (
        Image.fromarray(values).convert(mode)
        if channels < 4
        else Image.frombytes(mode, size, values.tobytes())
    )


def save(picture, path, **options):
    picture.save(path, **options)
    return path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("i2v"))
    return WanImageToVideoPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff"])
def test_common_formats_open_as_diffusers_opens_them(tmp_path, name):
    path = save(noise_picture(), tmp_path / name)
    ours = open_image(path)
    assert ours.mode == "RGB"
    assert np.array_equal(np.asarray(ours), np.asarray(load_image(str(path))))


def test_the_name_does_not_decide_the_format(tmp_path):
    path = tmp_path / "picture.txt"
    noise_picture().save(path, format="PNG")
    assert open_image(path).size == (60, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(noise_picture(), tmp_path / "a.jpg", exif=exif, quality=100)
    ours = open_image(path)
    assert ours.size == ((60, 40) if orientation < 5 else (40, 60))
    assert np.array_equal(np.asarray(ours), np.asarray(load_image(str(path))))


def test_transparency_is_laid_over_white(tmp_path):
    layer = Image.new("RGBA", (4, 1), (200, 0, 0, 255))
    layer.putpixel((1, 0), (0, 0, 0, 0))
    layer.putpixel((2, 0), (0, 0, 0, 51))
    pixels = np.asarray(open_image(save(layer, tmp_path / "a.png")))[0]
    assert pixels.tolist() == [[200, 0, 0], [255, 255, 255], [204, 204, 204], [200, 0, 0]]


def test_a_transparent_palette_is_laid_over_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    path = save(picture, tmp_path / "a.png", transparency=0)
    assert np.asarray(open_image(path))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def pillow_reads(path):
    try:
        Image.open(path).load()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    source = noise_picture().convert(mode)
    path = save(source, tmp_path / ("a.png" if mode in "L1PLA" else "a.tiff"))
    if mode == "YCbCr" and not pillow_reads(path):
        pytest.skip("this Pillow does not read the YCbCr TIFF that it wrote")
    ours = open_image(path)
    assert (ours.mode, ours.size) == ("RGB", (60, 40))
    if mode != "LA":
        assert np.array_equal(np.asarray(ours), np.asarray(source.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / "a.png")
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pixels_are_refused(tmp_path):
    path = save(Image.fromarray(np.ones((4, 4), np.float32)), tmp_path / "a.tiff")
    with pytest.raises(ImageError, match="floating-point"):
        open_image(path)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(path))[0, 0].tolist() == [255, 0, 0]


def refusal(path, **options):
    with pytest.raises(ImageError) as caught:
        open_image(path, **options)
    return str(caught.value)


def test_missing_and_wrong_files(tmp_path):
    assert "no such picture" in refusal(tmp_path / "none.png")
    assert "not a file" in refusal(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    assert "not a picture" in refusal(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("hello, I am text")
    assert "PNG or JPEG" in refusal(tmp_path / "b.png")


def test_a_pipe_is_not_opened(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a file" in refusal(tmp_path / "pipe.png")


def test_an_unreadable_file(tmp_path, monkeypatch):
    path = save(noise_picture(), tmp_path / "a.png")

    def denied(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refusal(path)


def test_formats_that_start_other_programs_are_not_read(tmp_path):
    path = tmp_path / "a.eps"
    noise_picture().save(path, format="EPS")
    Image.open(path).close()
    assert "not a picture" in refusal(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.tiff", "a.bmp"])
def test_truncated_files(tmp_path, name):
    path = save(noise_picture((200, 200)), tmp_path / name)
    whole = path.read_bytes()
    for share in (0.95, 0.5, 0.2):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert "damaged" in refusal(path)


def test_any_cut_or_flipped_byte_is_a_picture_or_an_image_error(tmp_path):
    random = np.random.default_rng(2)
    outcomes = set()
    for name in ("a.png", "a.jpg", "a.gif", "a.tiff", "a.webp"):
        path = save(noise_picture((16, 16)), tmp_path / name)
        whole = bytearray(path.read_bytes())
        for _ in range(60):
            damaged = whole.copy()
            damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
            path.write_bytes(damaged[: random.integers(len(damaged) // 2, len(damaged) + 1)])
            try:
                outcomes.add(open_image(path).mode)
            except ImageError:
                outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


def png_header(width, height):
    """A PNG that claims a size and holds no pixels worth mentioning."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


@pytest.mark.parametrize("size", [(20_000, 10_000), (8001, 8000), (10_000, 9_900)])
def test_too_many_pixels_are_refused_before_decoding(tmp_path, size, monkeypatch):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(*size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    message = refusal(path)
    assert f"{MAX_PIXELS:,}" in message
    assert "too large" in message


def test_the_limit_itself_is_allowed(tmp_path):
    path = save(noise_picture((60, 40)), tmp_path / "a.png")
    assert open_image(path, max_pixels=2400).size == (60, 40)
    assert "2,399" in refusal(path, max_pixels=2399)


def test_pillows_own_limit_is_left_alone(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    open_image(save(noise_picture(), tmp_path / "a.png"))
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("size", [(64, 48), (16, 160), (96, 96)])
def test_preprocess_equals_diffusers(size):
    picture = noise_picture((70, 50))
    width, height = size
    theirs = VideoProcessor(vae_scale_factor=8).preprocess(picture, height=height, width=width)
    ours = preprocess(picture, width, height)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    assert ours.min() < -0.5 < 0.5 < ours.max()


def test_clip_features_equal_the_pipelines_bit_for_bit(pipeline):
    picture = noise_picture((50, 70))
    encoder = pipeline.image_encoder
    bare = bare_clip(encoder)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        theirs = pipeline.encode_image(picture, "cpu")
        pixels = pixel_values(pipeline.image_processor.to_dict(), picture, 32)
        hidden = embed_pixels(bare.embeddings, bare.pre_layrnorm, pixels)
        count = layers_needed(encoder.config.num_hidden_layers)
        ours = encode_layers(enumerate(bare.encoder.layers[:count]), hidden)
    assert count == 3
    assert torch.equal(ours, theirs)
    assert ours.shape == (1, 17, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip_equals_transformers_in_each_type(dtype, activation):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=100, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=7, hidden_act=activation,
    )  # fmt: skip
    encoder = CLIPVisionModel(config).eval().to(dtype)
    bare = bare_clip(encoder)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        theirs = encoder(pixels, output_hidden_states=True).hidden_states[-2]
        hidden = embed_pixels(bare.embeddings, bare.pre_layrnorm, pixels)
        ours = encode_layers(enumerate(bare.encoder.layers[:2]), hidden)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


def test_the_folders_processor_is_used(pipeline, tmp_path):
    pipeline.image_processor.save_pretrained(tmp_path / "p")
    picture = noise_picture((64, 40))
    config = json.loads((tmp_path / "p" / "preprocessor_config.json").read_text())
    ours = pixel_values(config, picture, 32)
    theirs = pipeline.image_processor(images=picture, return_tensors="pt").pixel_values
    assert ours.shape == (1, 3, 32, 32)
    assert torch.equal(ours, theirs)
    with pytest.raises(CheckpointError, match="no usable image processor config"):
        make_image_processor({"size": 7.5})


PLAIN = {
    "size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24},
    "image_mean": [0.4, 0.5, 0.3], "image_std": [0.2, 0.3, 0.25], "resample": 2,
}  # fmt: skip


@pytest.mark.parametrize("picture_size", [(50, 70), (71, 31), (24, 24), (25, 300)])
@pytest.mark.parametrize(
    ("more", "plain"),
    [
        ({}, True),
        ({"size": 24, "crop_size": 24}, True),
        ({"size": {"height": 24, "width": 24}, "do_center_crop": False}, True),
        ({"size": {"height": 24, "width": 30}}, True),
        ({"rescale_factor": 0.01}, True),
        ({"size": {"shortest_edge": 20}}, False),
        ({"do_normalize": False}, False),
        ({"do_rescale": False}, False),
    ],
)
def test_a_plain_processor_is_followed_without_transformers(picture_size, more, plain):
    config, picture = PLAIN | more, noise_picture(picture_size)
    theirs = make_image_processor(config)(images=picture, return_tensors="pt").pixel_values
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(clip, "make_image_processor", None)
        assert torch.equal(pixel_values(config, picture, 24), theirs)


@pytest.mark.parametrize("size", [(50, 70), (300, 130), (32, 32), (16, 21), (1600, 35), (35, 1600)])
def test_the_whole_picture_is_squashed_as_the_makers_do(pipeline, size):
    picture, config = noise_picture(size), pipeline.image_processor.to_dict()
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    small = torch.nn.functional.interpolate(
        whole, size=(32, 32), mode="bicubic", align_corners=False, antialias=False
    )
    mean, deviation = (
        torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std")
    )
    ours = squashed_values(config, picture, 32)
    assert ours.shape == (1, 3, 32, 32) and ours.dtype == torch.float32
    assert (ours - (small * 0.5 + 0.5 - mean) / deviation).abs().max() <= 1e-6


def test_both_ends_of_a_wide_picture_are_seen_unless_the_centre_is_asked_for(pipeline):
    config = pipeline.image_processor.to_dict()
    plain, ends = Image.new("RGB", (160, 90)), Image.new("RGB", (160, 90))
    ends.paste((255, 255, 255), (0, 0, 30, 90))
    squashed, cropped = (
        [see(config, picture, 32) for picture in (plain, ends)]
        for see in (squashed_values, pixel_values)
    )
    assert (squashed[1] - squashed[0])[..., :5].min() > 3  # a white picture's distance to black
    assert torch.equal(*cropped)


def test_a_useless_processor_is_refused_whatever_is_seen():
    with pytest.raises(CheckpointError, match="no usable image processor config"):
        squashed_values({"size": 7.5}, noise_picture(), 32)


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_conditioning_equals_prepare_latents(pipeline, frames):
    vae = pipeline.vae
    image = preprocess(noise_picture(), 32, 48)
    shape = (1, 16, (frames - 1) // 4 + 1, 6, 4)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, theirs = pipeline.prepare_latents(
            image, 1, 16, 48, 32, frames, torch.float32, "cpu", latents=noise
        )
        clip = torch.cat(
            [image[:, :, None], image.new_zeros(1, 3, frames - 1, *image.shape[2:])], 2
        )
        encoded = vae.encode(clip).latent_dist.mode()
    ours = conditioning(encoded, vae.config.latents_mean, vae.config.latents_std)
    assert ours.shape == (1, 20, *shape[2:])
    assert torch.equal(ours, theirs)
    assert ours[:, :4, 0].eq(1).all()
    assert not ours[:, :4, 1:].any()


def test_to_rgb_keeps_an_rgb_picture():
    picture = noise_picture()
    assert np.array_equal(np.asarray(to_rgb(picture)), np.asarray(picture))
