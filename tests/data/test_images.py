"""Every kind of image file is read as Pillow reads it, or named."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from retina_fast.data.errors import ImageError
from retina_fast.data.images import read_image

HEIGHT, WIDTH = 20, 30  # neither alike nor symmetric, so that every turn shows
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
PICTURE = Image.fromarray(np.stack([X * 8, Y * 12, (X + Y) * 5], -1).astype(np.uint8))
WITH_ALPHA = PICTURE.copy()
WITH_ALPHA.putalpha(Image.fromarray((X * 8).astype(np.uint8)))

KINDS: dict[str, tuple[Image.Image, dict]] = {
    "rgb.jpg": (PICTURE, {"quality": 95}),
    "progressive.jpg": (PICTURE, {"progressive": True}),
    "grey.jpg": (PICTURE.convert("L"), {}),
    "cmyk.jpg": (PICTURE.convert("CMYK"), {"quality": 95}),
    "rgb.png": (PICTURE, {}),
    "grey.png": (PICTURE.convert("L"), {}),
    "grey_alpha.png": (PICTURE.convert("LA"), {}),
    "alpha.png": (WITH_ALPHA, {}),
    "palette.png": (PICTURE.quantize(16), {}),
    "palette_alpha.png": (PICTURE.quantize(16), {"transparency": 3}),
    "1bit.png": (PICTURE.convert("1"), {}),
    "rgb.webp": (PICTURE, {"lossless": True}),
    "alpha.webp": (WITH_ALPHA, {"lossless": True}),
    "palette.gif": (PICTURE.quantize(16), {}),
    "rgb.tif": (PICTURE, {"compression": "tiff_lzw"}),
    "grey.tiff": (PICTURE.convert("L"), {}),
    "cmyk.TIF": (PICTURE.convert("CMYK"), {}),
    "alpha.tiff": (WITH_ALPHA, {}),
    "1bit.tiff": (PICTURE.convert("1"), {"compression": "group4"}),
    "rgb.bmp": (PICTURE, {}),
    "palette.BMP": (PICTURE.quantize(16), {}),
}


def as_pillow_reads(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(ImageOps.exif_transpose(picture).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name, tmp_path):
    picture, options = KINDS[name]
    picture.save(tmp_path / name, **options)
    image = read_image(tmp_path / name)
    assert (image.dtype, image.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    # Two libraries' libjpeg may round differently.
    assert (image.int() - as_pillow_reads(tmp_path / name).int()).abs().max() <= (2 if name.endswith("jpg") else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_exif_orientation(suffix, orientation, mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    PICTURE.convert(mode).save(path, exif=exif, lossless=suffix == "webp")
    image = read_image(path)
    assert image.shape == ((3, HEIGHT, WIDTH) if orientation < 5 else (3, WIDTH, HEIGHT))
    assert (image.int() - as_pillow_reads(path).int()).abs().max() <= 2


@pytest.mark.parametrize(("channels", "color_type"), [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_16_bits_keep_their_upper_8(channels, color_type, tmp_path):
    values = np.stack([X * 2100 + Y * 100 + c for c in range(channels)], -1).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, color_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "deep.png").write_bytes(content)
    expected = values[:, :, :3] if channels > 2 else values[:, :, [0, 0, 0]]
    assert read_image(tmp_path / "deep.png").permute(1, 2, 0).tolist() == (expected >> 8).tolist()


def test_of_16_bits_in_a_tiff_the_upper_8_are_kept(tmp_path):
    values = (X * 2100 + Y * 100).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    assert read_image(tmp_path / "deep.tiff").tolist() == [(values >> 8).tolist()] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("name", ["of_another_kind.jpg", "of_another_kind.webp", "without_suffix", "b\udcffytes.png"])
def test_the_content_decides_not_the_name(kind, name, tmp_path):
    PICTURE.save(tmp_path / "named", format=kind)
    expected = as_pillow_reads(tmp_path / "named").int()
    (tmp_path / "named").rename(tmp_path / name)
    assert (read_image(tmp_path / name).int() - expected).abs().max() <= (2 if kind == "JPEG" else 0)


def test_a_turned_webp_under_a_jpegs_name_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURE.save(tmp_path / "a.jpg", format="WEBP", exif=exif, lossless=True)
    assert read_image(tmp_path / "a.jpg").shape == (3, WIDTH, HEIGHT)


def test_an_avif_is_read_where_pillow_does(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    PICTURE.save(tmp_path / "a.avif", quality=100)
    assert torch.equal(read_image(tmp_path / "a.avif"), as_pillow_reads(tmp_path / "a.avif"))


def test_the_first_of_several_pages_is_read(tmp_path):
    PICTURE.save(tmp_path / "two.tif", save_all=True, append_images=[ImageOps.flip(PICTURE)])
    assert torch.equal(read_image(tmp_path / "two.tif"), as_pillow_reads(tmp_path / "two.tif"))


def test_a_picture_that_might_be_a_bomb_is_named(tmp_path, monkeypatch):
    PICTURE.save(tmp_path / "large.bmp")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"large\.bmp: not a readable image \(Image size .* exceeds limit"):
        read_image(tmp_path / "large.bmp")


def test_an_animated_gif_gives_its_first_picture(tmp_path):
    frames = [PICTURE.quantize(16), ImageOps.flip(PICTURE).quantize(16)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert torch.equal(read_image(tmp_path / "two.gif"), as_pillow_reads(tmp_path / "two.gif"))


def test_a_gif_that_says_it_is_huge_takes_no_memory(tmp_path):
    PICTURE.quantize(16).save(tmp_path / "huge.gif")
    content = bytearray((tmp_path / "huge.gif").read_bytes())
    content[6:10] = struct.pack("<HH", 60_000, 60_000)
    (tmp_path / "huge.gif").write_bytes(content)
    with pytest.raises(ImageError, match=r"huge\.gif: not a readable image \(Image size .* exceeds limit"):
        read_image(tmp_path / "huge.gif")


def test_pixels_that_a_gif_does_not_give_are_not_what_was_in_memory(tmp_path):
    frame = PICTURE.quantize(16)
    frame.save(tmp_path / "small.gif")
    content = bytearray((tmp_path / "small.gif").read_bytes())
    content[6:10] = struct.pack("<HH", 5 * WIDTH, 5 * HEIGHT)  # the picture is a corner of it
    (tmp_path / "small.gif").write_bytes(content)
    images = []
    for value in (7, 201):
        poison = [torch.full((3 * 25 * HEIGHT * WIDTH,), value, dtype=torch.uint8) for _ in range(20)]
        del poison
        images.append(read_image(tmp_path / "small.gif"))
    assert images[0].shape == (3, 5 * HEIGHT, 5 * WIDTH)
    assert torch.equal(*images)
    assert torch.equal(images[0][:, :HEIGHT, :WIDTH], as_pillow_reads(tmp_path / "small.gif")[:, :HEIGHT, :WIDTH])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut.jpg", "incomplete or truncated"),
        ("cut.png", "truncated"),
        ("cut.webp", ""),
        ("cut.bmp", "truncated"),
        ("cut.tiff", ""),
        ("picture.ppm", "no JPEG, PNG, WebP, GIF, TIFF, BMP or AVIF"),
        ("number.tiff", "numbers of 32 bits"),
        ("text.webp", "cannot identify image file"),
        ("empty.png", "non empty"),
        ("huge.png", "MemoryError"),
    ],
)
def test_what_cannot_be_read_is_named(name, reason, tmp_path):
    path = tmp_path / name
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    if name == "number.tiff":
        noise.convert("F").save(path)
    elif name in ("text.webp", "empty.png"):
        path.write_text("no image" * (name != "empty.png"))
    else:
        noise.save(path)
    if name == "huge.png":  # 2**31 - 1 pixels wide and high
        content = path.read_bytes()
        head = b"IHDR" + b"\x7f\xff\xff\xff" * 2 + content[24:29]
        path.write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])
    if name.startswith("cut"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: not a readable image (")
    assert reason in str(error.value)
    assert ".cpp" not in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_damaged_files_are_named_or_read_and_never_end_the_process(suffix, tmp_path):
    """torchvision's decoder of PNG ends the process on most of these."""
    r = random.Random(0)
    path = tmp_path / f"damaged.{suffix}"
    PICTURE.save(path)
    sound, outcomes = path.read_bytes(), set()
    for _ in range(150):
        content = bytearray(sound[: r.randrange(1, len(sound))] if r.random() < 0.3 else sound)
        for _ in range(r.randrange(3)):
            content[r.randrange(len(content))] = r.randrange(256)
        path.write_bytes(content)
        try:
            image = read_image(path)
            assert (image.dtype, image.shape[0], image.ndim) == (torch.uint8, 3, 3)
            outcomes.add("read")
        except ImageError as error:
            outcomes.add("named" if str(error).startswith(f"{path}: not a readable image (") else str(error))
    assert outcomes == {"read", "named"}


def test_a_name_that_no_file_can_have_is_no_image_file(tmp_path):
    for name in ("a" * 5000 + ".png", "no\0name.png", "folder.png"):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        with pytest.raises(ImageError, match="no such image file"):
            read_image(tmp_path / name)


def test_pngs_larger_than_pillow_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    PICTURE.save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png").shape == (3, HEIGHT, WIDTH)
