"""Videos that are cut short, turned, or read again from another folder."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retina_fast.predict.video import frames, is_video
from tests.predict.test_odd_sources import model
from tests.predict.test_sources import array, write_video


@pytest.fixture
def photo() -> torch.Tensor:
    """A picture of noise, (3, 48, 64) uint8."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 64), dtype=np.uint8)
    return torch.from_numpy(pixels)


def test_a_damaged_video_gives_the_frames_before_the_damage(photo, tmp_path, monkeypatch):
    whole = write_video(photo, tmp_path / "clip.mkv", frames=6).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    monkeypatch.chdir(tmp_path)
    cut = model.predict("cut.mkv")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert torch.equal(cut[0].image, photo)
    assert cut[-1].path == f"cut.mkv#{len(cut) - 1}"
    assert re.match(r"cut\.mkv: is cut short: it ends after 0\.\d of 1\.2 seconds", str(cut[-1].error))
    assert 1 <= len([results for results in cut if not results.error]) < 6
    with pytest.warns(UserWarning, match=r"text\.mp4: not a readable video"):
        (broken,) = model.predict(tmp_path / "text.mp4")
    assert broken.error


def test_a_video_turned_by_its_metadata_is_upright(photo, tmp_path):
    av = pytest.importorskip("av")

    class Frame:
        rotation = -90  # clockwise, as of a telephone that is held upright

        def to_ndarray(self, format):
            return array(photo)

    stream = SimpleNamespace(index=0)

    class Container:
        streams, duration = SimpleNamespace(video=[stream]), None
        format = SimpleNamespace(name="mov,mp4,m4a,3gp,3g2,mj2")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def demux(self):
            return [SimpleNamespace(stream=stream, pts=None, decode=lambda: [Frame()])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(av, "open", lambda *_, **__: Container())
        (frame,) = frames("clip.mp4")
    assert torch.equal(frame, torch.rot90(photo, -1, (1, 2)))
    write_video(photo, tmp_path / "clip.mkv").rename(tmp_path / "no_suffix")
    assert is_video(tmp_path / "no_suffix")
