"""Pictures of a run: grids with captions, films, mistakes, detections, label maps. Written whole or not at all."""

import functools
import io
import math
import pathlib

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from addp_jax import errors, files

CAPTION_HEIGHT = 16
GIF_SECONDS = 3.0  # of a film, before it rests
LARGEST_NUMBER = 10_000  # of the confusion picture; where there are larger ones it shows per cent
NUMBERED_CLASSES = 20  # at most so many get their numbers written into the confusion picture


def save_pictures(folder, images):
    """Writes {name: [H,W,3], uint8 or float in [0,1]} as `<folder>/<name>.png`; returns the paths.

    Raises UserError naming the file that cannot be written.
    """
    paths = {name: pathlib.Path(folder) / f"{name}.png" for name in images}
    for name, image in images.items():
        write(paths[name], functools.partial(Image.fromarray(to_uint8(image)).save, format="PNG"))
    return list(paths.values())


def save_gif(path, frames):
    """Frames [T,h,w,3] uint8 as an endless film that rests on the last one; returns the path.

    Raises UserError naming the file if it cannot be written.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    durations = [round(1000 * GIF_SECONDS / len(pictures))] * (len(pictures) - 1) + [round(500 * GIF_SECONDS)]
    film = dict(format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write(pathlib.Path(path), functools.partial(pictures[0].save, **film))
    return pathlib.Path(path)


def grid(images, columns, pad=2):
    """Images [N,h,w,3] (uint8, or float in [0,1]) in rows on white, uint8 [H,W,3]."""
    images = to_uint8(images)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top = pad + index // columns * (height + pad)
        left = pad + index % columns * (width + pad)
        canvas[top : top + height, left : left + width] = image
    return canvas


def captioned(rows):
    """A stack of (caption, image [h,w,3]) pairs, each image below its caption in one line, uint8 [H,W,3]."""
    font = ImageFont.load_default()
    rows = [(files.printable(caption), to_uint8(image)) for caption, image in rows]
    width = max([image.shape[1] for _, image in rows] + [math.ceil(font.getlength(c)) + 4 for c, _ in rows])
    canvas = Image.new("RGB", (width, sum(CAPTION_HEIGHT + image.shape[0] for _, image in rows)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for caption, image in rows:
        draw.text((2, top + 2), caption, fill="black", font=font)
        canvas.paste(Image.fromarray(image), (0, top + CAPTION_HEIGHT))
        top += CAPTION_HEIGHT + image.shape[0]
    return np.asarray(canvas)


def contact_sheet(captions, images, columns=8):
    """`images` [N,h,w,3] in rows, each above its caption: uint8 [H,W,3]."""
    column = captioned(list(zip(captions, images)))  # captions above
    cells = column.reshape(len(images), -1, *column.shape[1:])
    return grid(np.roll(cells, -CAPTION_HEIGHT, axis=1), columns)


def confusion(examples, hits, matrix=None):
    """The picture of a classifier's mistakes: uint8 [H,W,3].

    examples, hits: int [C], of each true class; matrix: int [C,C] with true classes as rows, or None for many classes.
    On the left each row of the matrix as shares of its class or, without one, the worst classes by number; on the right
    the accuracy of every class that has examples, from the worst to the best.
    """
    from matplotlib import figure
    from matplotlib.backends import backend_agg

    numbers = np.flatnonzero(examples)
    accuracy = hits[numbers] / examples[numbers]
    order = np.argsort(accuracy, kind="stable")
    numbers, accuracy = numbers[order], accuracy[order]
    canvas = backend_agg.FigureCanvasAgg(figure.Figure(figsize=(10, 5), dpi=100, layout="constrained"))
    left, right = canvas.figure.subplots(1, 2)
    if matrix is None:
        _bars(left, numbers[:NUMBERED_CLASSES], accuracy[:NUMBERED_CLASSES])
        left.set(title=f"the {min(len(numbers), NUMBERED_CLASSES)} worst of {len(numbers)} classes", ylabel="class")
    else:
        _squares(left, matrix, matrix / np.maximum(examples, 1)[:, None])
    if len(numbers) <= NUMBERED_CLASSES:
        _bars(right, numbers, accuracy)
    else:
        right.fill_betweenx(np.arange(len(accuracy) + 1) - 0.5, np.append(accuracy, accuracy[-1:]), step="post")
        worst = ", ".join(map(str, numbers[:NUMBERED_CLASSES]))
        right.set(xlim=(0, 1), ylim=(-0.5, len(numbers) - 0.5), yticks=[], xlabel=f"worst: {worst}")
    right.set(title="accuracy of each class")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def schedules(begin, best, distances):
    """A fitted schedule beside the one it began with, {name: [T]} each, and the distances by number: uint8 [H,W,3]."""
    from matplotlib import figure
    from matplotlib.backends import backend_agg

    names = [name for name, values in begin.items() if isinstance(values, list)]
    size = (3 * (1 + len(names)), 3)
    canvas = backend_agg.FigureCanvasAgg(figure.Figure(figsize=size, dpi=100, layout="constrained"))
    *panels, curve = canvas.figure.subplots(1, 1 + len(names))
    for axes, name in zip(panels, names):
        for values, style in ((begin[name], "C7.--"), (best[name], "C0.-")):
            axes.plot(range(1, len(values) + 1), values, style)
        axes.set(title=name.replace("_", " "), xlabel="step")
    panels[0].legend(("at the start", "best"))
    curve.plot(distances, "C7.", markersize=3)
    curve.plot(np.minimum.accumulate(distances), "C0")
    curve.set(title="distance", xlabel="schedules tried")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _squares(axes, matrix, shares):
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(title="true class (row) taken for (column)", xlabel="class", ylabel="class")
    if len(matrix) <= NUMBERED_CLASSES:
        axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
        for row, column in np.argwhere(matrix):
            shade = "white" if shares[row, column] > 0.5 else "black"
            text = matrix[row, column] if matrix.max() < LARGEST_NUMBER else f"{shares[row, column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)


def _bars(axes, numbers, accuracy):
    axes.barh(range(len(numbers)), accuracy)
    axes.set(xlim=(0, 1), ylim=(-0.5, len(numbers) - 0.5), yticks=range(len(numbers)))
    axes.set_yticklabels(numbers)


def detections(image, boxes, masks, names, scores=None):
    """`image` [H,W,3] with objects drawn over it, uint8 [H,W,3]. Truth beside prediction: `grid` of two such pictures.

    Each object has a colour: its mask is tinted with it, its box is outlined, and its name stands in the box's corner.

    Args:
      boxes: [N,4], (x0, y0, x1, y1) in pixels.
      masks: bool [N,H,W], or None.
      names: [N] texts.
      scores: [N], 0..1, written behind the names; None = none. Higher ones lie on top.
    """
    canvas = to_uint8(image).copy()
    order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
    colours = [ImageColor.getrgb(f"hsl({222 * n % 360},90%,55%)") for n in range(len(boxes))]  # neighbours far apart
    for n in order if masks is not None else ():
        canvas[masks[n]] = canvas[masks[n]] // 2 + np.array(colours[n], np.uint8) // 2
    picture, font = Image.fromarray(canvas), ImageFont.load_default()
    draw = ImageDraw.Draw(picture)
    for n in order:
        x0, y0, x1, y1 = (float(end) for end in boxes[n])
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colours[n], width=2)
        text = files.printable(str(names[n])) + ("" if scores is None else f" {scores[n]:.2f}")
        corner = max(x0, 0), max(min(y0, picture.height - CAPTION_HEIGHT), 0)
        draw.rectangle(draw.textbbox(corner, text, font=font), fill=colours[n])
        draw.text(corner, text, fill="black", font=font)
    return np.asarray(picture)


def colours(count):
    """uint8 [count,3]: RGB far apart from each other for numbers that are near."""
    tones = [f"hsl({222 * n % 360},{90 - 25 * (n // 60 % 3)}%,{(55, 35, 75)[n // 20 % 3]}%)" for n in range(count)]
    return np.array([ImageColor.getrgb(tone) for tone in tones], np.uint8).reshape(-1, 3)


def segmentation(image, label, names):
    """`image` [H,W,3] tinted with the colours of its classes, above a legend of those there: uint8 [H+legend,W,3].

    label: int [H,W], 0..C-1; other numbers (ignored pixels) leave the image as it is. names: [C] texts.
    """
    canvas, palette = to_uint8(image).copy(), colours(len(names))
    classes = np.asarray(label) < len(names)
    canvas[classes] = canvas[classes] // 2 + palette[label[classes]] // 2
    numbers, areas = np.unique(label[classes], return_counts=True)
    return np.concatenate([canvas, legend(numbers[np.argsort(-areas, kind="stable")], names, canvas.shape[1])])


def save_labels(path, label, palette):
    """Writes a label map [H,W] as a PNG file of its numbers; number n shows as the colour palette[n], RGB uint8 [N,3].

    Raises UserError naming the file if it cannot be written.
    """
    picture = Image.fromarray(np.asarray(label, np.uint8)).convert("L")
    picture.putpalette(palette.tobytes())
    write(pathlib.Path(path), functools.partial(picture.save, format="PNG"))


def legend(numbers, names, width):
    """Coloured squares with the `names` of the classes `numbers`, in lines of `width` pixels: uint8 [lines,width,3]."""
    font, palette, places, x, y = ImageFont.load_default(), colours(len(names)), [], 0, 0
    texts = [files.printable(str(names[n])) for n in numbers]
    for text in texts:
        extent = math.ceil(font.getlength(text)) + CAPTION_HEIGHT + 6
        if x and x + extent > width:
            x, y = 0, y + CAPTION_HEIGHT
        places.append((x, y))
        x += extent
    picture = Image.new("RGB", (width, y + CAPTION_HEIGHT if texts else 0), "white")
    draw = ImageDraw.Draw(picture)
    for number, text, (x, y) in zip(numbers, texts, places):
        draw.rectangle((x + 2, y + 3, x + 12, y + 13), fill=tuple(map(int, palette[number])))
        draw.text((x + CAPTION_HEIGHT, y + 2), text, fill="black", font=font)
    return np.asarray(picture)


def to_uint8(image):
    """[...] float in [0,1] -> uint8, rounded; uint8 as it is. What is not finite becomes black."""
    image = np.asarray(image)
    if image.dtype == np.uint8:
        return image
    return np.rint(np.clip(np.nan_to_num(image.astype(np.float32)), 0.0, 1.0) * 255.0).astype(np.uint8)


def write(path, save):
    """Writes `path` whole, in a folder that is made, by `save(file)`. Raises UserError naming it."""
    content = io.BytesIO()
    save(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, lambda file: file.write(content.getbuffer()))
    except OSError as error:
        raise errors.UserError(f"cannot write {path}: {files.reason(error)}") from error
