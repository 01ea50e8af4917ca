import contextlib
import os

import pytest
import torch

from retina_fast.data.errors import UserError
from retina_fast.data.files import replacing


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "a.txt"
    for text in ("first", "second"):
        with replacing(file) as partial:
            partial.write_text(text)
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("content", ["small", torch.zeros(300_000)], ids=["small", "large"])
def test_a_full_disk_leaves_the_old_file(tmp_path, content):
    file = tmp_path / "model.pt"
    torch.save("old", file)
    (tmp_path / f"model.pt.{os.getpid()}.partial").symlink_to("/dev/full")  # each write into it fails as on a full disk
    message = r"model\.pt: cannot be written .*what it held before is unharmed"
    with pytest.raises(UserError, match=message), replacing(file) as partial:
        torch.save(content, partial)
    assert torch.load(file) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_what_ends_in_between_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), replacing(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    with replacing(file) as partial:
        partial.write_text("new")
    assert file.read_text() == "new"


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "a.txt"):
        raise KeyError("a")
