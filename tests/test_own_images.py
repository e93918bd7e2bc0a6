"""Own images on their canvases: what is resized, what is drawn anew, what is told of it."""

import numpy as np
import pytest
from PIL import Image

from addp_jax import errors
from addp_jax.generation import own_images

S = 16


def write(folder, **pictures):
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(np.asarray(picture)).save(folder / f"{name}.png")
    return str(folder)


def colour(height, width, value=0):
    return np.full((height, width, 3), value, np.uint8)


def ramp(height, width):
    """Red grows downwards, green to the right."""
    image = colour(height, width)
    image[..., 0], image[..., 1] = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)
    return image


def white(height, width, *places):
    mask = np.zeros((height, width), np.uint8)
    for place in places:
        mask[place] = 255
    return mask


def test_an_image_of_the_canvas_size_is_left_as_it_is(tmp_path):
    own = own_images.OwnImages(write(tmp_path, a=ramp(S, S)), S)
    np.testing.assert_array_equal(own.image(0), ramp(S, S))
    assert not own.redrawn(0).any() and own.summary().endswith("1 images")


def test_one_line_says_what_happened_to_images_of_other_sizes(tmp_path):
    folder = write(tmp_path, a=ramp(S, S), b=ramp(2 * S, 3 * S), c=ramp(2 * S, 2 * S))
    (tmp_path / "d.png").write_text("text")
    own = own_images.OwnImages(folder, S)
    assert own.summary().endswith("4 images; 2 resized to 16 pixels, 1 cropped in the middle, 1 unreadable")
    assert own.image(1).shape == (S, S, 3) and own.image(3) is None and "not an image" in own.skipped[str(tmp_path / "d.png")]


def test_a_truncated_image_is_skipped_when_it_is_read(tmp_path):
    folder = write(tmp_path, a=np.random.default_rng(0).integers(0, 255, (S, S, 3), np.uint8))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    own = own_images.OwnImages(folder, S)
    assert own.image(0) is None and list(own.skipped) == [str(tmp_path / "a.png")]


def test_margins_shrink_the_image_and_are_drawn_anew(tmp_path):
    own = own_images.OwnImages(write(tmp_path, a=ramp(S, S)), S, margins=(0.5, 0.25, 0.0, 0.25))
    expected = np.ones((S, S), bool)
    expected[4:12, 8:] = False
    np.testing.assert_array_equal(own.redrawn(0), expected)
    image = own.image(0)
    assert image[4, 8, 0] < 20 and image[11, 15, 0] > 235
    np.testing.assert_array_equal(image[:4, 8:], image[4:5, 8:].repeat(4, 0))  # its border, repeated


@pytest.mark.parametrize("shape, kept", [((8, 32), np.s_[6:10, :]), ((32, 8), np.s_[:, 6:10])])
def test_the_whole_of_an_image_is_shrunk_until_it_fits(tmp_path, shape, kept):
    own = own_images.OwnImages(write(tmp_path, a=ramp(*shape)), S, whole=True)
    expected = np.ones((S, S), bool)
    expected[kept] = False
    np.testing.assert_array_equal(own.redrawn(0), expected)
    part = own.image(0)[kept]
    assert part[0, 0].max() < 45 and part[-1, -1, :2].min() > 210 and "1 with bands beside it" in own.summary()


def test_a_phone_picture_lies_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(ramp(8, 32)).save(tmp_path / "a.jpg", exif=exif)
    own = own_images.OwnImages(str(tmp_path), S, whole=True)
    assert not own.redrawn(0)[:, 6:10].any() and own.redrawn(0)[:, :6].all()


def test_what_is_white_in_a_mask_is_drawn_anew_even_one_pixel_of_a_large_one(tmp_path):
    pictures, masks = write(tmp_path / "pictures", a=ramp(S, S), b=ramp(30 * S, 30 * S)), tmp_path / "masks"
    write(masks, a=white(S, S, np.s_[2:4, 5]), b=white(30 * S, 30 * S, np.s_[45, 75]))
    own = own_images.OwnImages(pictures, S, str(masks))
    np.testing.assert_array_equal(np.argwhere(own.redrawn(0)), [[2, 5], [3, 5]])
    np.testing.assert_array_equal(np.argwhere(own.redrawn(1)), [[1, 2]])
    np.testing.assert_array_equal(np.flatnonzero(own_images.to_tokens(own.redrawn(0), 4)), [1])
    np.testing.assert_array_equal(np.flatnonzero(own_images.to_tokens(own.redrawn(0), 8)), [10])


def test_a_mask_moves_with_its_image_and_a_square_one_belongs_to_the_canvas(tmp_path):
    pictures = write(tmp_path / "pictures", a=ramp(8, 32))
    masks = write(tmp_path / "masks", own=white(8, 32, np.s_[:, 30:]), square=white(2 * S, 2 * S, np.s_[:, :2]))
    cropped = own_images.OwnImages(pictures, S, f"{masks}/own.png")
    assert not cropped.redrawn(0).any()  # it was in the part that is cropped off
    whole = own_images.OwnImages(pictures, S, f"{masks}/own.png", whole=True).redrawn(0)
    assert whole[6:10, 15].all() and not whole[6:10, :15].any() and whole[:6].all()
    np.testing.assert_array_equal(own_images.OwnImages(pictures, S, f"{masks}/square.png").redrawn(0)[:, :2].sum(), S)


def test_pixels_far_from_the_seam_are_the_own_ones_and_those_drawn_anew_are_the_new_ones():
    redrawn = white(S, S, np.s_[:, :4]) > 0
    blended = own_images.blend(colour(S, S, 200), colour(S, S, 100), redrawn, 4)
    assert (blended[:, :4] == 200).all() and (blended[:, 8:] == 100).all()
    assert (np.diff(blended[0, 3:9, 0].astype(int)) <= 0).all() and 100 < blended[0, 5, 0] < 200
    film = own_images.blend(np.stack([colour(S, S, 200)] * 2), colour(S, S, 100), redrawn, 4)
    np.testing.assert_array_equal(film, [blended, blended])


def test_mistakes_are_one_line_that_names_field_and_file(tmp_path):
    pictures, masks = write(tmp_path / "pictures", a=ramp(8, 32), b=ramp(S, S)), tmp_path / "masks"
    write(masks, a=white(8, 32, np.s_[0]))
    for arguments, words in (
        ({"masks": str(masks)}, ("config.generate.masks", "no mask named 'b'")),
        ({"masks": write(tmp_path / "black", a=white(8, 32), b=white(S, S)) + "/a.png"}, ("a.png", "black all over")),
        ({"masks": write(tmp_path / "other", a=white(8, 30, 0), b=white(S, S, 0))}, ("30x8", "32x8")),
        ({"masks": f"{pictures}/a.png"}, ("config.generate.masks", "lies among the images")),
        ({"masks": str(tmp_path / "nowhere.png")}, ("config.generate.masks", "nowhere.png")),
        ({"margins": (0.5, 0.0, 0.5, 0.0)}, ("config.generate.margins", "(0.5, 0.0, 0.5, 0.0)")),
        ({"margins": (-0.5, 0.0, 0.0, 0.0)}, ("config.generate.margins",)),
    ):
        with pytest.raises(errors.UserError) as told:
            own = own_images.OwnImages(pictures, S, **arguments)
            [own.redrawn(i) for i in range(2)]
        assert all(word in str(told.value) for word in words) and "\n" not in str(told.value)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("text")
    with pytest.raises(errors.UserError, match="none of the 1 files"):
        own_images.OwnImages(str(tmp_path / "text"), S)


@pytest.mark.parametrize("mode", ("RGBA", "LA", "P", "PA16"))
def test_transparent_parts_of_a_mask_are_not_painted(tmp_path, mode):
    """White paint on the left half of a transparent layer."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, :4] = 255
    picture = Image.fromarray(np.dstack([np.full((8, 8, 3), 255, np.uint8), alpha]))
    if mode == "P":
        picture = picture.quantize(4)
    elif mode == "LA":
        picture = picture.convert("LA")
    elif mode == "PA16":
        picture = Image.fromarray((alpha.astype(np.uint16) * 257))
    picture.save(tmp_path / "mask.png")
    white = own_images.read_mask(str(tmp_path / "mask.png"))
    assert white[:, :4].all() and not white[:, 4:].any()


def test_wide_grey_masks_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 300, 32000, 33100, 65535]], np.uint16)).save(tmp_path / "mask.png")
    assert own_images.read_mask(str(tmp_path / "mask.png")).tolist() == [[False, False, False, True, True]]


def test_images_of_one_name_have_masks_of_their_own(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / "pictures" / name, **{"1": ramp(S, S)})
    write(tmp_path / "masks" / "cat", **{"1": white(S, S, np.s_[:2])})
    write(tmp_path / "masks" / "dog", **{"1": white(S, S, np.s_[:4])})
    own = own_images.OwnImages(str(tmp_path / "pictures"), S, str(tmp_path / "masks"))
    assert [int(own.redrawn(i).sum()) for i in range(2)] == [2 * S, 4 * S]
    write(tmp_path / "flat", **{"1": white(S, S)})
    with pytest.raises(errors.UserError, match="could belong to .*cat/1.png and to .*dog/1.png"):
        own_images.OwnImages(str(tmp_path / "pictures"), S, str(tmp_path / "flat"))


@pytest.mark.parametrize("shape", [(3, 9000), (9000, 3), (1, 5000)])
def test_of_a_strip_only_what_is_kept_is_resized(tmp_path, monkeypatch, shape):
    """The same as of the whole but for rounding; what is resized is never larger than the canvas."""
    waves = 128 + 80 * np.sin(np.arange(shape[0])[:, None] / 3 + np.arange(shape[1]) / 3)
    picture = waves.astype(np.uint8)[..., None].repeat(3, -1)
    folder, masks = write(tmp_path / "pictures", a=picture), write(tmp_path / "masks", a=(picture[..., 0] > 128) * np.uint8(255))
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: made.append(size) or resize(self, size, *rest))
    own = own_images.OwnImages(folder, 128, masks)
    image, redrawn = own.image(0), own.redrawn(0)
    assert max(height * width for width, height in made) <= 128 * 128 and image.shape == (128, 128, 3)
    monkeypatch.setattr(own_images.transforms, "MAX_STRIP", 2**40)
    own_images.redrawn.cache_clear()
    assert np.abs(image.astype(int) - own.image(0)).max() <= 2 and (redrawn == own.redrawn(0)).mean() > 0.99


def test_an_ordinary_image_is_resized_as_a_whole():
    picture = np.random.default_rng(0).integers(0, 256, (37, 61, 3), np.uint8)
    box = own_images.Box(0, -5, 16, 26)
    resized, kept = own_images.fitted(Image.fromarray(picture), box, own_images.Box(0, 0, 16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized, Image.fromarray(picture).resize((26, 16), Image.Resampling.BICUBIC))
    assert kept == box


def test_a_mask_that_could_belong_to_two_images_and_two_masks_of_one_image_are_refused(tmp_path):
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    write(pictures, a=ramp(S, S))
    Image.fromarray(ramp(S, S)).save(pictures / "a.jpg")
    write(masks, a=white(S, S, np.s_[:2]))
    with pytest.raises(errors.UserError, match=r"masks/a.png could belong to .*a\.(jpg|png) and to .*a\.(jpg|png)"):
        own_images.OwnImages(str(pictures), S, str(masks))
    (pictures / "a.jpg").unlink()
    Image.fromarray(white(S, S, np.s_[:4])).save(masks / "a.bmp")
    with pytest.raises(errors.UserError, match=r"masks/a.bmp and .*masks/a.png are for the same image"):
        own_images.OwnImages(str(pictures), S, str(masks))
