"""Hostile files from a seed: each case is a folder, and the command (or the call) that reads it.

What is made wrong: the headers of safetensors and GGUF files, their metadata, indices, every
config, LoRAs, profiles, pictures, and a tokenizer's files as far as our own code reads them. A case
is a function of its number.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAN = ("plan", "--device", "cpu", "--vram", "200MiB", "--ram", "200MiB", "--frames", "5",
        "--size", "48x32", "--steps", "2")  # fmt: skip
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "image_encoder": "model.safetensors",
}


@dataclass(frozen=True)
class Case:
    """A hostile folder.

    Attributes:
        area: what is wrong in it.
        kind: "cli": ``arguments`` go to the command; "tokenise", "picture", "job": the call of that
            name takes ``arguments[0]``.
    """

    area: str
    kind: str
    arguments: tuple[str, ...]


def make(number: int, base: Path, folder: Path) -> Case:
    """Case ``number`` in the new ``folder``, from the sound model ``base``, which is only read."""
    rng = random.Random(number)
    area = AREAS[number % len(AREAS)]
    folder.mkdir()
    return area(rng, base, folder)


def value(rng: random.Random) -> Any:
    """What no config says, or says once in a blue moon."""
    return rng.choice(
        [
            None, True, False, 0, 1, -1, 2, 7, 255, 1 << 20, 10**7, 10**9, 1 << 31, 1 << 63, 10**30,
            -(10**9), 0.5, 1.0, 40.0, -0.1, 1e-300, 1e308, float("nan"), float("inf"), "", "40",
            "x", "x" * 10_000, "ünï\u0000", [], [1], [1, 2, 2], [0.5] * 16, [True, False], [[]], {},
            {"a": 1}, {"shortest_edge": 10**9}, {"height": -1, "width": 32}, [None, None], ["a"],
            _Digits(5000), _Deep(100_000), [10**9] * 3, list(range(5000)),
        ]
    )  # fmt: skip


class _Digits:
    """A whole number of so many digits."""

    def __init__(self, count: int) -> None:
        self.text = "9" * count


class _Deep:
    """So many lists, one in another."""

    def __init__(self, depth: int) -> None:
        self.text = "[" * depth + "]" * depth


def as_json(content: Any) -> str:
    """JSON that may hold the two above."""
    if isinstance(content, _Digits | _Deep):
        return content.text
    if isinstance(content, dict):
        pairs = (f"{json.dumps(str(key))}: {as_json(each)}" for key, each in content.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(content, list | tuple):
        return "[" + ", ".join(map(as_json, content)) + "]"
    return json.dumps(content)


def _copy(base: Path, folder: Path, *changed: str) -> Path:
    """The model, by links but for the parts that are ``changed``."""
    model = folder / "model"
    model.mkdir()
    for each in base.iterdir():
        if each.name in changed and each.is_dir():
            shutil.copytree(each, model / each.name)
        elif each.name in changed:
            shutil.copy(each, model / each.name)
        else:
            (model / each.name).symlink_to(each, target_is_directory=each.is_dir())
    return model


def _plan(model: Path, *more: str) -> tuple[str, ...]:
    return (*PLAN, "--model", str(model), *more)


def _config(rng: random.Random, base: Path, folder: Path) -> Case:
    part = rng.choice(list(WEIGHTS))
    model = _copy(base, folder, part)
    path = model / part / "config.json"
    path.write_text(_spoilt_object(rng, path.read_text()))
    if rng.random() < 0.2:
        return Case("config job", "job", (str(model),))
    return Case("config", "cli", _plan(model))


def _spoilt_object(rng: random.Random, text: str) -> str:
    way = rng.randrange(8)
    if way == 0:
        return text[: rng.randrange(len(text))]
    if way == 1:
        return as_json(value(rng))
    content = json.loads(text)
    for _ in range(1 if way < 6 else 4):
        name = rng.choice(list(content))
        if way == 2:
            content.pop(name, None)
        else:
            content[name] = value(rng)
    return as_json(content)


_SIDES = ("scheduler/scheduler_config.json", "image_processor/preprocessor_config.json",
          "defaults.json", "model_index.json")  # fmt: skip


def _side(rng: random.Random, base: Path, folder: Path) -> Case:
    name = rng.choice(_SIDES)
    model = _copy(base, folder, name.split("/")[0])
    path = model / name
    text = path.read_text() if path.exists() else '{"steps": 2, "fps": 16, "negative_prompt": ""}'
    path.write_text(_spoilt_object(rng, text))
    if name.startswith(("scheduler", "image")) and rng.random() < 0.5:
        return Case("side job", "job", (str(model),))
    return Case("side", "cli", _plan(model))


def _safetensors(header: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _header(rng: random.Random, base: Path, folder: Path) -> Case:
    part = rng.choice(list(WEIGHTS))
    whole = (base / part / WEIGHTS[part]).read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    table = json.loads(whole[8 : 8 + size])
    spoil = rng.choice(_HEADERS)
    path = folder / "file.safetensors"
    path.write_bytes(spoil(rng, table, whole[8 + size :]))
    return Case("header", "cli", ("inspect", str(path)))


_Table = dict[str, Any]


def _fields(rng: random.Random, table: _Table, data: bytes) -> bytes:
    name = rng.choice([key for key in table if key != "__metadata__"])
    field = rng.choice(["dtype", "shape", "data_offsets"])
    table[name] = {**table[name], field: value(rng)}
    return _safetensors(as_json(table), data)


def _renamed(rng: random.Random, table: _Table, data: bytes) -> bytes:
    """Numbers of blocks that are none, or far too large, and names that lead astray."""
    old = rng.choice([key for key in table if key != "__metadata__"])
    number = rng.choice(["10000000", "9" * 40, "9" * 5000, "-1", "²", "٣", "1e9", "", "0" * 400])
    new = rng.choice([
        f"blocks.{number}.attn1.to_q.weight", f"encoder.block.{number}.layer.0.layer_norm.weight",
        f"encoder.layers.{number}.mlp.fc1.weight", "../../x", "/etc/x", "a" * 5000, "a." * 2000,
        "\n\u001b[31m", "",
    ])  # fmt: skip
    table = {(new if key == old else key): entry for key, entry in table.items()}
    return _safetensors(as_json(table), data)


def _many(rng: random.Random, table: _Table, data: bytes) -> bytes:
    """Keys twice, or more tensors than anything has."""
    count = rng.choice([3000, 30_000])
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    if rng.random() < 0.5:
        pairs = [f'"a{number % (count - 1)}":{entry}' for number in range(count)]
    else:
        pairs = [f'"t{number}":{entry}' for number in range(3 * count)]
    return _safetensors("{" + ",".join(pairs) + "}")


def _nested(rng: random.Random, table: _Table, data: bytes) -> bytes:
    depth = rng.choice([100, 10_000, 200_000])
    inner = rng.choice(["[" * depth, '{"a":' * depth, "[" * depth + "]" * depth, "[]," * depth])
    return _safetensors('{"a":' + inner + "}")


def _long(rng: random.Random, table: _Table, data: bytes) -> bytes:
    length = rng.choice([0, 1, 99_999_999, 1 << 40, (1 << 64) - 1])
    return _safetensors(as_json(table), data, length)


def _bytes(rng: random.Random, table: _Table, data: bytes) -> bytes:
    """Cut, or with bytes that are others."""
    whole = bytearray(_safetensors(as_json(table), data))
    if rng.random() < 0.4:
        return bytes(whole[: rng.randrange(len(whole))])
    end = len(whole) - len(data)
    for _ in range(rng.choice([1, 1, 8])):
        whole[rng.randrange(end)] = rng.randrange(256)
    return bytes(whole)


def _metadata(rng: random.Random, table: _Table, data: bytes) -> bytes:
    key = rng.choice(["_quantization_metadata", "penstock", "config_base64", "format"])
    names = ("layers", "gguf", "version", "num_layers", "runs", "model_type")
    odd: dict[str, Any] = {name: value(rng) for name in names}
    content = as_json(odd | {"_class_name": "WanTransformer3DModel"})
    text = rng.choice([content, as_json(value(rng)), "{", "\ud800"])
    if key == "config_base64" and rng.random() < 0.8:
        text = base64.b64encode(text.encode("utf-8", "replace")).decode()
    table["__metadata__"] = rng.choice([{key: text}, {key: value(rng)}, value(rng)])
    return _safetensors(as_json(table), data)


_HEADERS: list[Callable[[random.Random, _Table, bytes], bytes]] = [
    _fields, _fields, _renamed, _renamed, _many, _nested, _long, _bytes, _bytes, _metadata,
]  # fmt: skip


def _index(rng: random.Random, base: Path, folder: Path) -> Case:
    name = "model.safetensors.index.json"
    places = rng.choice([
        {"a": "model-00001-of-00001.safetensors"}, {"a": "../x.safetensors"}, {"a": value(rng)},
        {f"t{number}": f"{number}.safetensors" for number in range(3000)}, value(rng), {"a": ""},
    ])  # fmt: skip
    (folder / name).write_text(
        as_json({"metadata": {"total_size": value(rng)}, "weight_map": places})
    )
    return Case("index", "cli", ("inspect", str(folder / name)))


def _gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _gguf(rng: random.Random, base: Path, folder: Path) -> Case:
    """A small file of our own making, then with lying counts, or other bytes."""
    counts = [rng.choice([2, 2, 2, 0, 70_000, 1 << 40, (1 << 64) - 1]) for _ in range(2)]
    if rng.random() < 0.6:
        counts = [2, 3]
    pairs = _gguf_string("general.architecture") + struct.pack("<I", 8) + _gguf_string("wan")
    kind = rng.choice([4, 7, 8, 9, 12, 13, 200])
    size = rng.choice([1, 4096, 4097, 100_000, 1 << 40])
    pairs += (
        _gguf_string("list") + struct.pack("<IIQ", 9, kind, size) + bytes(4 * min(size, 100_000))
    )
    pairs += _gguf_string("comfy.gguf.orig_shape.a") + struct.pack("<IIQ", 9, 5, 3)
    pairs += struct.pack("<3i", *(rng.choice([1, -1, 32, 1 << 30]) for _ in range(3)))
    tensors = b""
    for name in ("blocks.0.self_attn.q.weight", "blocks.9999999.self_attn.q.weight"):
        dims = rng.choice([[32], [32, 32], [1 << 60, 1 << 60], [0], [33, 3], [1] * 8, [1] * 9])
        tensors += _gguf_string(name) + struct.pack("<I", len(dims))
        tensors += struct.pack(f"<{len(dims)}Q", *dims)
        tensors += struct.pack("<IQ", rng.choice([0, 1, 8, 14, 99]), rng.choice([0, 4096, 1 << 62]))
    whole = bytearray(b"GGUF" + struct.pack("<IQQ", rng.choice([2, 3, 3, 4]), *counts))
    whole += pairs + tensors + bytes(4096)
    if rng.random() < 0.5:
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    if rng.random() < 0.2:
        del whole[rng.randrange(len(whole)) :]
    path = folder / "file.gguf"
    path.write_bytes(whole)
    return Case("gguf", "cli", ("inspect", str(path)))


def _lora(rng: random.Random, base: Path, folder: Path) -> Case:
    """A pair of matrices for one layer, whose alphas and metadata are odd."""
    width = 96
    down, up = [2, width], [width, 2]
    table: _Table = {}
    place = 0
    style = rng.choice(["transformer.", "base_model.model.", "diffusion_model."])
    module = "blocks.0.attn1.to_q" if style != "diffusion_model." else "blocks.0.self_attn.q"
    for end, shape in (("lora_A.weight", down), ("lora_B.weight", up)):
        nbytes = 4 * shape[0] * shape[1]
        table[f"{style}{module}.{end}"] = {
            "dtype": "F32", "shape": shape, "data_offsets": [place, place + nbytes]
        }  # fmt: skip
        place += nbytes
    data = bytes(place)
    if rng.random() < 0.3:
        odd = struct.pack("<f", rng.choice([float("nan"), float("inf"), 1e38, -1.0]))
        table[f"{style}{module}.alpha"] = {
            "dtype": "F32", "shape": [], "data_offsets": [place, place + 4]
        }  # fmt: skip
        data += odd
    config = {
        rng.choice(["lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "r"]): value(rng),
        "alpha_pattern": rng.choice([{}, {"to_q": value(rng)}, {"^(a+)+$": 1}, value(rng)]),
    }
    if style == "base_model.model.":
        (folder / "adapter_config.json").write_text(as_json(config))
    else:
        table["__metadata__"] = {"lora_adapter_metadata": as_json(config)}
    path = folder / "lora.safetensors"
    path.write_bytes(_safetensors(as_json(table), data))
    if rng.random() < 0.5:
        return Case("lora", "cli", ("inspect", str(path)))
    return Case("lora", "cli", _plan(base, "--lora", str(path)))


def _profile(rng: random.Random, base: Path, folder: Path) -> Case:
    path = folder / "own.toml"
    name = rng.choice(["vram", "ram", "pinned_share", "formats", "summary", "tiles", "x", "disk"])
    odd = value(rng)
    text = odd.text if isinstance(odd, _Digits | _Deep) else json.dumps(odd)
    path.write_bytes(rng.choice([
        f"{name} = {text}\n".encode(), b"a = " + b"[" * 50_000, b"[" + b"a." * 20_000 + b"b]\n",
        b"vram = 1\nvram = 2\n", bytes(rng.randrange(256) for _ in range(200)), b"a." * 30_000,
        b"x" * 300_000, b"vram = '9e999GiB'\n", b"ram = '" + b"9" * 400 + b"GiB'\n",
    ]))  # fmt: skip
    words = [*PLAN]
    words[words.index("--vram") : words.index("--vram") + 4] = []
    return Case("profile", "cli", (*words, "--model", str(base), "--profile", str(path)))


def _folders(rng: random.Random, base: Path, folder: Path) -> Case:
    """A ComfyUI root with odd extra paths."""
    (folder / "models" / "diffusion_models").mkdir(parents=True)
    aliases = "a: &a0 [x]\n" + "".join(
        f"b{n}: &a{n + 1} [*a{n},*a{n},*a{n},*a{n}]\n" for n in range(30)
    )
    text = rng.choice([
        aliases + "comfy:\n  base_path: *a30\n  vae: *a30\n", "[" * 20_000, "a: " + "x" * 400_000,
        "comfy:\n  vae: 5\n  base_path: [1]\n", "comfy: [vae]\n", "\u0000", "- 1\n- 2\n",
        "comfy:\n  base_path: \"\\0\"\n  vae: x\n", "? {a: b}\n: c\n",
    ])  # fmt: skip
    (folder / "extra_model_paths.yaml").write_text(text)
    return Case("extra paths", "cli", _plan(folder))


def _tokenizer(rng: random.Random, base: Path, folder: Path) -> Case:
    """As far as our own code reads them; what a library reads is left out or cut to nothing."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / "tokenizer" / name, folder / name)
    way = rng.randrange(5)
    if way == 0:
        (folder / "tokenizer.json").write_text(rng.choice(["", "{", "[]", "{}", "5", "\u0000"]))
    elif way == 1:
        (folder / "tokenizer.json").unlink()
        (folder / "spiece.model").write_bytes(bytes(rng.randrange(256) for _ in range(300)))
    elif way == 2:
        (folder / "tokenizer.json").unlink()
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config[rng.choice(["pad_token", "eos_token", "unk_token", "x"])] = value(rng)
        (folder / "tokenizer_config.json").write_text(as_json(config))
    return Case("tokenizer", "tokenise", (str(folder),))


def _png(width: int, height: int, depth: int, colour: int, body: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(
        ">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, 0
    )
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _picture(rng: random.Random, base: Path, folder: Path) -> Case:
    sides = [rng.choice([0, 1, 8, 64, 3000, 9000, 100_000, (1 << 31) - 1]) for _ in range(2)]
    depth, colour = rng.choice([(8, 2), (16, 2), (16, 0), (8, 6), (16, 6), (8, 3), (3, 9)])
    body = bytes(rng.choice([0, 100, 100_000]))
    path = folder / "picture.png"
    content = _png(*sides, depth, colour, body)
    if rng.random() < 0.3:
        content = content[: rng.randrange(len(content))]
    path.write_bytes(rng.choice([content, content, content, b"", b"GIF89a", b"\xff\xd8\xff\xe0"]))
    if rng.random() < 0.3:
        return Case("picture", "cli", _plan(base, "--image", str(path)))
    return Case("picture", "picture", (str(path),))


AREAS: list[Callable[[random.Random, Path, Path], Case]] = [
    _config, _config, _side, _header, _header, _header, _index, _gguf, _gguf, _lora, _profile,
    _folders, _tokenizer, _picture,
]  # fmt: skip
