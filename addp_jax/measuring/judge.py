"""How many images are recognisably of a class: `python -m addp_jax.measuring.judge --judge=... --samples=...`.

The judge is a classifier trained with the task `convnet`, for data where Inception has nothing to say. It knows the
training classes only: it tells whether a sample shows one of them, not whether samples are as varied as the data.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import errors, files, pictures, schema
from addp_jax.data import part, pipeline, transforms
from addp_jax.measuring import image_set
from addp_jax.metrics import classification as metrics
from addp_jax.weights import checkpoint, feature_nets

NAMED = 0.8  # top class probability above which a sample counts as recognisable
BATCH_SIZE = 64
NUM_REAL = 1024  # real held-out images that the judge itself is measured on
NUM_PICTURES = 64  # samples on the contact sheet


class Judge:
    """A trained classifier. Raises UserError if `workdir` holds no checkpoint of the task `convnet`."""

    def __init__(self, workdir: str):
        params, info = checkpoint.load_params(workdir, ema=True)
        identity = info["identity"]
        if "convnet" not in params or "model" not in identity:
            raise errors.UserError(f"{workdir} is no run of the task convnet; train one with configs/demo_judge.py")
        self.net, self.params = feature_nets.convnet_of(workdir, params, identity)
        recorded = {name: value for name, value in identity["data"].items() if name not in ("classes", "content")}
        self.data = schema.build(pipeline.Config, recorded | identity["location"], "config.data")
        self._predict = jax.jit(lambda params, image: jax.nn.softmax(self.net.apply({"params": params}, image)))

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N,H,W,3], of the judge's size or resized to it (bicubic, central square) -> float32 [N,C]."""
        size, out = self.net.config.image_size, []
        for first in range(0, len(images), BATCH_SIZE):
            batch = [transforms.centre_square(image, size, size) for image in images[first : first + BATCH_SIZE]]
            padded = np.stack(batch + batch[-1:] * (BATCH_SIZE - len(batch)))  # one shape, one compilation
            out.append(np.asarray(self._predict(self.params, jnp.asarray(padded, jnp.float32) / 255))[: len(batch)])
        return np.concatenate(out)

    def held_out(self):
        """(images uint8 [n,S,S,3], labels [n], class names) of the data that the judge was evaluated on."""
        size = self.net.config.image_size
        source = pipeline.open_source(self.data, "eval", size)
        shown = part.Part(source, min(NUM_REAL, len(source)))
        to_size, rng = transforms.eval_image(size), np.random.default_rng(0)
        examples = [to_size(shown[i], rng) for i in range(len(shown))]
        names = source.classes or tuple(f"class {n}" for n in range(self.net.config.num_classes))
        return np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples]), names


def summary(probs: np.ndarray, class_names) -> dict:
    """From class probabilities [N,C].

    named: fraction of the images whose top class has a probability above 0.8; confidence: mean probability of the
    top class; classes: {name: images with that top class}; entropy: of this histogram, in nats, 0..log C.
    """
    if not np.isfinite(probs).all():
        raise errors.UserError("the judge's probabilities are NaN or infinite; train another one")
    top = probs.argmax(1)
    counts = np.bincount(top, minlength=probs.shape[1])
    share = counts[counts > 0] / len(top)
    return {
        "named": float((probs.max(1) > NAMED).mean()),
        "confidence": float(probs.max(1).mean()),
        "classes": {class_names[n] if n < len(class_names) else f"class {n}": int(k) for n, k in enumerate(counts)},
        "entropy": float(-(share * np.log(share)).sum()) + 0.0,  # not -0.0
    }


def read_samples(path: str) -> np.ndarray:
    """`arr_0` of an .npz, uint8 [N,H,W,3]. Raises UserError naming the file."""
    image_set.read_header(path, "--samples")
    return image_set.read_arrays(path, ("arr_0",), "--samples")["arr_0"]


def run(workdir: str, samples: str, output: str) -> dict:
    """Judge `samples`, write the contact sheet to `output`, and return what the command prints."""
    images = read_samples(samples)
    jury = Judge(workdir)
    real, labels, names = jury.held_out()
    probs, real_probs = jury.probabilities(images), jury.probabilities(real)
    accuracy = float(metrics.in_top(real_probs, labels, 1).mean())
    result = {"samples": len(images), **summary(probs, names)}
    result["real"] = {"images": len(real), "accuracy": accuracy, "named": summary(real_probs, names)["named"]}
    result["protocol"] = (
        f"named: top class probability > {NAMED} by a convnet trained on {jury.data.path or jury.data.source} at "
        f"{jury.net.config.image_size} px, its own accuracy on {len(real)} held-out images {accuracy:.1%}"
    )
    shown = list(zip(probs[:NUM_PICTURES].argmax(1), probs[:NUM_PICTURES].max(1)))
    sheet = pictures.contact_sheet([f"{names[n]} {p:.0%}" for n, p in shown], images[:NUM_PICTURES])
    path = pathlib.Path(output)
    pictures.save_pictures(path.parent, {path.stem: sheet})
    return result | {"sheet": output}


@files.exit_on_mistake()
def main(argv=None) -> None:
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("python -m addp_jax.measuring.judge", description=about, allow_abbrev=False)
    add = functools.partial(parser.add_argument, type=files.expand)
    add("--judge", required=True, help="work directory of a run of the task convnet")
    add("--samples", required=True, help="samples.npz of --mode=generate")
    add("--output", default="", help="contact sheet, .png; default: judged.png beside the samples")
    options = parser.parse_args(argv)
    output = options.output or str(pathlib.Path(options.samples).with_name("judged.png"))
    if not output.endswith(".png"):
        raise errors.UserError(f"--output={output}: give a file that ends in .png")
    files.require_writable(pathlib.Path(output).parent, "--output")
    print(json.dumps(run(options.judge, options.samples, output)))


if __name__ == "__main__":
    main()
