"""A child that sleeps, leaves, takes memory or is killed costs its caller one line."""

import json
import signal
import sys
from pathlib import Path

import pytest

from penstock.engine.files import tokenizer as tokenizers
from penstock.engine.files.apart import ChildLimits, call_apart
from penstock.engine.files.tokenizer import Tokenizer
from penstock.engine.request.demo import MINI
from penstock.errors import CheckpointError
from penstock.units import GIB, MIB

CHILD = "tests.engine.files.standins"
posix = pytest.mark.skipif(sys.platform == "win32", reason="no such limits or signals")


def refusal(function, limits=None, **arguments):
    with pytest.raises(CheckpointError) as caught:
        call_apart(f"{CHILD}:{function}", arguments, "the file x", limits or ChildLimits())
    text = str(caught.value)
    assert text.startswith("the file x cannot be used")
    assert "\n" not in text
    return text


def test_the_answer_comes_back_from_a_process_without_torch():
    found = call_apart(f"{CHILD}:echo", {"text": "naïve \udcff 猫"}, "x", ChildLimits())
    assert found == {"found": "naïve \udcff 猫", "torch": False, "path": "1"}


def test_a_child_that_sleeps_is_ended():
    assert "no answer in 0.5 s" in refusal("sleep", ChildLimits(seconds=0.5))


def test_a_child_that_leaves_is_told():
    assert "exit code 7" in refusal("leave", code=7)


@posix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_is_killed_is_told(number):
    assert number.name in refusal("die", number=int(number))


@posix
def test_a_child_that_takes_too_much_memory_is_refused_it():
    limits = ChildLimits(memory_bytes=GIB // 2)
    assert "MemoryError" in refusal("take", limits, nbytes=GIB)
    assert call_apart(f"{CHILD}:take", {"nbytes": 64 * MIB}, "x", limits) == 64 * MIB


def test_what_a_child_raises_is_its_last_line():
    assert "ValueError: odd" in refusal("complain", text="first\nValueError: odd")
    assert len(refusal("complain", text="x" * 10_000)) < 600


def test_an_interpreter_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "does not start" in refusal("echo", text="a")


def test_nothing_of_the_current_folder_is_imported(tmp_path, monkeypatch):
    for name in ("json.py", "tokenizers.py", "penstock.py"):
        (tmp_path / name).write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (prompt,) = Tokenizer(MINI / "tokenizer").tokenise(["a green square"])
    assert prompt.length > 3


@pytest.mark.parametrize("function", ["sleep", "leave"])
def test_a_tokenizer_is_read_in_such_a_child(monkeypatch, tmp_path, function):
    """Whatever happens to the process that reads the tokenizer: one line with the file's name."""
    monkeypatch.setattr(tokenizers, "call_apart", stand_in(function))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Tokenizer(tmp_path, ChildLimits(seconds=0.5)).tokenise(["a"])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Tokenizer(tmp_path, ChildLimits(seconds=0.5)).for_transformers()


def stand_in(function):
    more = {"code": 5} if function == "leave" else {}

    def call(asked, request, where, limits):
        assert asked.startswith("penstock.engine.files.tokens:")
        return call_apart(f"{CHILD}:{function}", more, where, limits)

    return call


def folder(tmp_path: Path, **files) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MINI / "tokenizer" / name).read_bytes())
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"tokenizer": "{}"}, ""),
        ({"tokenizer": "not json"}, ""),
        ({"tokenizer": "[" * 200_000}, ""),
        ({"tokenizer_config": '{"pad_token": "<none>"}'}, "no padding mark"),
        ({"tokenizer_config": "{"}, "JSONDecodeError"),
        ({"special_tokens_map": '{"pad_token": {"content": "<none>"}}', "tokenizer_config": "{}"},
         "no padding mark"),
    ],
)  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, files, found):
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(folder(tmp_path, **files)).tokenise(["a"])
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_odd_configs_are_passed_over(tmp_path):
    config = json.dumps({"pad_token": 5, "eos_token": ["x"], "auto_map": {"AutoTokenizer": "x.y"}})
    (prompt,) = Tokenizer(folder(tmp_path, tokenizer_config=config)).tokenise(["a green square"])
    assert prompt == Tokenizer(MINI / "tokenizer").tokenise(["a green square"])[0]


def test_what_is_written_says_that_a_text_begins_with_a_space(tmp_path):
    """Without it in the config, transformers 4 takes the space out of the tokenizer."""
    config = (MINI / "tokenizer" / "tokenizer_config.json").read_text()
    less = json.dumps({k: v for k, v in json.loads(config).items() if k != "add_prefix_space"})
    tokenizer = Tokenizer(folder(tmp_path, tokenizer_config=less))
    content, said = tokenizer.written()
    assert json.loads(content)["pre_tokenizer"]["add_prefix_space"] is said["add_prefix_space"]
    (ours,) = tokenizer.tokenise(["a green square"])
    assert tokenizer.for_transformers()("a green square").input_ids == list(ours.ids[: ours.length])
