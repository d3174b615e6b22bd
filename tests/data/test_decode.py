"""Every kind of image becomes the right square of 8-bit RGB, or a reason why not."""

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import encode
from PIL import Image, ImageFile

from lowvram.data.dataset import BadImageError
from lowvram.data.decode import decode_square


def square(data: bytes, resolution: int = 16) -> np.ndarray:
    return decode_square(data, file="x.png", resolution=resolution).pixels


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def raw_png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by hand: PIL cannot write 16-bit colour, nor a header that lies."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_formats(format):
    pixels = square(encode((200, 100, 50), format=format))
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, np.broadcast_to([200, 100, 50], pixels.shape), atol=4)


def test_grey_becomes_three_equal_channels():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(square(encode(ramp)), np.repeat(ramp[..., None], 3, axis=2))


def test_16_bit_grey_is_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(square(encode(ramp))[..., 0], np.round(ramp / 257))


def test_16_bit_colour_is_scaled():
    pixels = np.random.default_rng(0).integers(0, 65536, (16, 16, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    difference = square(raw_png(16, 16, 16, 2, rows)).astype(int) - pixels / 257
    assert np.abs(difference).max() <= 1


def test_transparency_shows_white():
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    pixels = square(saved(image))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == pytest.approx([127] * 3, abs=1)
    assert pixels[5, 5].tolist() == [255, 0, 0]


def test_palette_with_and_without_transparency():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 0)
    assert square(saved(image))[0, :2].tolist() == [[0, 0, 0], [10, 200, 30]]
    assert square(saved(image, transparency=0))[0, :2].tolist() == [[255, 255, 255], [10, 200, 30]]


def test_grey_with_alpha():
    image = Image.new("LA", (16, 16), (80, 0))
    assert (square(saved(image)) == 255).all()


def test_cmyk_jpeg():
    image = Image.new("RGB", (16, 16), (220, 40, 90)).convert("CMYK")
    np.testing.assert_allclose(square(saved(image, "JPEG", quality=95))[4, 4], [220, 40, 90], atol=6)


def test_a_phone_jpeg_with_a_second_picture_behind_it():
    first, second = Image.new("RGB", (16, 16), (200, 100, 50)), Image.new("RGB", (8, 8), (0, 0, 255))
    data = saved(first, "MPO", save_all=True, append_images=[second])
    np.testing.assert_allclose(square(data)[4, 4], [200, 100, 50], atol=4)


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation(tag):
    """Each of the eight tags gives the image that PIL's own (whole-image) transpose gives."""
    from PIL import ImageOps

    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = tag
    data = saved(Image.fromarray(pixels), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(square(data), np.asarray(expected))


def test_centre_crop_and_turn_of_a_wide_image():
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255
    assert (square(encode(wide)) == 255).all()
    assert (square(encode(wide.transpose(1, 0, 2).copy())) == 255).all()


def test_resize_is_antialiased():
    """A fine checkerboard becomes even grey; picking pixels would keep black or white."""
    board = np.indices((256, 256)).sum(0) % 2 * 255
    pixels = square(encode(board.astype(np.uint8)))
    np.testing.assert_allclose(pixels, 127.5, atol=3)


def test_a_large_jpeg_shrinks_to_the_same_picture():
    """JPEG takes the scaled decode; it must not change what is seen."""
    y, x = np.mgrid[0:512, 0:512]
    smooth = np.stack([x / 2, y / 2, (x + y) / 4], axis=-1).astype(np.uint8)
    jpeg, png = square(encode(smooth, format="JPEG")), square(encode(smooth))
    assert np.abs(jpeg.astype(int) - png).max() <= 6


def test_enlarged_is_told():
    assert decode_square(encode((1, 2, 3)), file="x", resolution=32).enlarged
    assert not decode_square(encode((1, 2, 3)), file="x", resolution=16).enlarged


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_is_never_half_grey(format, tolerant, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)  # as some libraries leave it
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, format=format)
    for keep in (0.95, 0.5, 0.05):
        with pytest.raises(BadImageError, match=r"^x.png: "):
            square(data[: int(len(data) * keep)])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


def test_not_an_image():
    for data in (b"", b"hello", b"<html>" * 100):
        with pytest.raises(BadImageError, match="not a PNG, JPEG, WebP or BMP image"):
            square(data)


def test_damaged_png():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = bytearray(encode(noise))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BadImageError, match="damaged"):
        square(bytes(data))


@pytest.mark.parametrize("size", [(12_000, 12_000), (100_000, 100_000)])
def test_decompression_bomb_is_refused_by_its_header(size, monkeypatch):
    """A header of 144 megapixels (PIL would decode it) and of 10 gigapixels, with no pixels behind them."""

    def decoded(*_):
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(BadImageError, match="decompression bomb"):
        square(raw_png(*size, 8, 2, b""))


def test_the_crop_lets_in_nothing_from_beside_it():
    """A resize that reads past the edge of its box would bleed black into the white square."""
    wide = np.zeros((400, 1200, 3), np.uint8)
    wide[:, 400:800] = 255
    assert (square(encode(wide)) == 255).all()
