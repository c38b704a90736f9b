# SPDX-License-Identifier: Apache-2.0
"""Files that a user names: what is no file is refused at once, what is large is not read, what is written is whole."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minference_vllm import files
from minference_vllm.errors import LONGEST_MESSAGE, ConfigError
from minference_vllm.files import parse_json, read_file, read_lines, refuse_unwritable, write_file

NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    NO_FILES[kind](path)
    with pytest.raises(ConfigError, match="The file cannot be read: "):
        read_file(path, "The file")
    with pytest.raises(ConfigError, match="The file cannot be read: "):
        list(read_lines(path, "The file"))


def test_a_large_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 2**40)  # nobody could read it
    with pytest.raises(ConfigError, match="The file is larger than 5 bytes"):
        read_file(path, "The file", most=5)


def test_lines_are_read_one_at_a_time_and_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\r\n\ntwo")
    assert list(read_lines(path, "x")) == [b"one\r\n", b"\n", b"two"]
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 4)
    with pytest.raises(ConfigError, match="x has a line of more than 4 bytes"):
        list(read_lines(path, "x"))
    monkeypatch.undo()
    monkeypatch.setattr(files, "MAX_LINES_BYTES", 8)
    with pytest.raises(ConfigError, match="x is larger than 8 bytes"):
        list(read_lines(path, "x"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        (b'[{"b": {}, "b": {}}]', "the key 'b' stands there twice"),
        (b"NaN", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        ('{"a": 1}'.encode("utf-16"), "is not valid JSON"),
        (b'"\xed\xa0\x80"', "is not valid JSON"),
        (b"[" * 10_000, "x is nested too deeply"),
    ],
)
def test_json_that_readers_disagree_about_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_json(content, "x")


def test_a_byte_order_mark_is_no_fault() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_file(link, "new", "x")
    assert (real.read_text(), real.stat().st_mode & 0o777, link.is_symlink()) == ("new", 0o600, True)
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(ConfigError, match="x cannot be written: "):
            write_file(path, "new", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_could_not_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuse_unwritable(tmp_path / "new" / "deep" / "a.json", "x")
    with pytest.raises(ConfigError, match=r"x cannot be written: .*file is no folder that can be written"):
        refuse_unwritable(tmp_path / "file" / "a.json", "x")


def test_a_message_is_one_line_with_an_end_whatever_is_in_it() -> None:
    assert str(ConfigError("a\nb\x1b[31m\ud800\u202e c")) == "a b\\x1b[31m\\ud800\\u202e c"
    message = str(ConfigError("x" * 10**6 + " Do this."))
    assert len(message) == LONGEST_MESSAGE
    assert message.endswith(" Do this.")
