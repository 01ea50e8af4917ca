"""Text files as the editors of any system write them."""

from pathlib import Path

import pytest

from retina_fast.data.encodings import encoding_of
from retina_fast.data.errors import UserError
from retina_fast.predict.image_files import image_files

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", ["", "a", "ab", "a.jpg\r\nB\xe4ume \u6811.jpg\r\n", '{"a": "\u6811\U0001f333"}'])
def test_text_is_read_as_it_was_written(encoding, text, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert (tmp_path / "a.txt").read_bytes().decode(encoding_of(tmp_path / "a.txt")) == text


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lists_of_images_to_detect_in(encoding, tmp_path):
    (tmp_path / "list.txt").write_bytes("a.jpg\r\n\r\nB\xe4ume \u6811.jpg\n".encode(encoding))
    assert list(image_files([tmp_path / "list.txt"])) == [Path("a.jpg"), Path("B\xe4ume \u6811.jpg")]


@pytest.mark.parametrize("content", [b"B\xe4ume.jpg", b"\xff\xfea", b"\xff\xfe\0\xd8"])
def test_a_list_in_another_encoding_is_refused(content, tmp_path):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"list\.txt: not a list of image files"):
        list(image_files([tmp_path / "list.txt"]))
