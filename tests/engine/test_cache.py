"""The cache of packs: names that depend on content, a list, and removal of nothing else."""

import shutil
from pathlib import Path

import pytest

from penstock.engine.cache import cache_folder, cached_packs, pack_folder, remove_pack
from penstock.engine.locate import locate
from penstock.engine.pack import pack
from penstock.errors import UsageError
from tests.engine import golden


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


def test_a_pack_is_named_by_what_its_source_holds(tmp_path, model):
    first = pack_folder(locate(model), "int8", tmp_path)
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert pack_folder(locate(copy), "int8", tmp_path) == first
    assert pack_folder(locate(model), "nf4", tmp_path) != first
    path = next((copy / "vae").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert pack_folder(locate(copy), "int8", tmp_path) != first


def test_packs_are_listed_and_removed(tmp_path, model):
    cache = tmp_path / "cache"
    assert cached_packs(cache) == []
    folder = pack_folder(locate(model), "int8", cache)
    report = pack(locate(model), "int8", folder)
    stopped = cache / f"wan-fp8-{'0' * 16}"
    stopped.mkdir()
    (stopped / "x.safetensors.new").write_bytes(b"123")
    (cache / "users-own-folder").mkdir()
    found = {each.name: each for each in cached_packs(cache)}
    assert set(found) == {folder.name, stopped.name}
    assert found[folder.name].complete
    assert found[folder.name].nbytes > report.nbytes
    assert (found[stopped.name].complete, found[stopped.name].nbytes) == (False, 3)
    assert remove_pack(cache, folder.name) == found[folder.name].nbytes
    assert not folder.exists()
    for name in ("users-own-folder", "../cache", "", str(tmp_path)):
        with pytest.raises(UsageError, match="no such pack"):
            remove_pack(cache, name)
    assert (cache / "users-own-folder").exists()


def test_the_place_of_the_cache():
    assert cache_folder({"PENSTOCK_CACHE": "/data/packs"}) == Path("/data/packs")
    assert cache_folder({}).name == "packs"
