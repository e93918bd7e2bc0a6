"""A task, a sampler, a codec and a source are one new file each: they run without an edit elsewhere."""

import json
import sys

import jax
import numpy as np
import pytest

from addp_jax import codecs, modes, samplers, tasks
from addp_jax.data import sources
from addp_jax.tasks import tokenizer
from addp_jax.training import loop
from configs import base

SOURCE = '''
"""Stripes: the label is their direction."""
import numpy as np
from addp_jax.data import sources


class Stripes(sources.Source):
    classes, labelled = ("across", "down"), True

    def __init__(self, size, image_size):
        self.size, self.image_size = size, image_size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        bright = np.broadcast_to((np.arange(self.image_size) + i) // 2 % 2, (self.image_size,) * 2)
        image = np.stack([bright if i % 2 else bright.T] * 3, -1).astype(np.uint8) * 255
        return {"image": image, "label": np.int32(i % 2), "phase": np.float32(i % 4), "index": np.int32(i)}

    def fingerprint(self, times=False):
        return f"stripes {self.size}"


def open_split(config, split, image_size):
    return Stripes(config.num_train if split == "train" else config.num_eval, image_size)
'''

TASK = '''
"""Tells the phase of stripes: reads a field of the example that no other task knows."""
import dataclasses
import jax
import jax.numpy as jnp
import numpy as np
from addp_jax import schema, tasks
from addp_jax.ops import images


@dataclasses.dataclass(frozen=True)
class Config:
    image_size: int = schema.field(64, least=1, tiny=16)
    weight: float = schema.field(1.0, least=0, matters=schema.TRAINING)


class Task(tasks.Task):
    layout = ((r".*/kernel", ("replicated",)),)

    def __init__(self, config, dtype):
        self.config, self.image_size = config, config.image_size

    @property
    def example(self):
        return super().example | {"phase": jax.ShapeDtypeStruct((), np.float32)}

    def init(self, rng):
        return {"phase": {"kernel": jax.random.normal(rng, (3,))}}

    def loss(self, params, frozen, batch, rng, train):
        found = images.to_unit(batch["image"]).mean((1, 2)) @ params["phase"]["kernel"]
        loss = self.config.weight * ((found - batch["phase"]) ** 2).mean()
        return loss, {"loss": loss}

    def evaluate(self, params, frozen, batches, source):
        losses = [float(self.loss(params, frozen, batch, None, False)[0]) for batch in batches]
        return tasks.Results({"loss": sum(losses) / len(losses)}, {})
'''

SAMPLER = '''
"""All unknown tokens at once."""
import dataclasses
from typing import NamedTuple
import jax.numpy as jnp
import numpy as np
from addp_jax import samplers, schema


@dataclasses.dataclass(frozen=True)
class Config(samplers.Config):
    shift: int = schema.field(0, least=0)
    name: str = "at_once"


class At(NamedTuple):
    step: np.ndarray
    num_masked: np.ndarray


def segments(config, length, mask_ratio, fewest=None):
    return [(None, At(np.arange(1), np.zeros((1,) if fewest is None else (1, length + 1), np.int32)))]


def step(nets, config, static, carry, at, noise):
    logits = nets.predict(carry.image, carry.token_ids, carry.mask, 0)
    token_ids = jnp.where(carry.mask, (logits + noise.tokens).argmax(-1) + config.shift, carry.token_ids)
    return samplers.Carry(nets.decode(nets.codebook[token_ids]), token_ids, jnp.zeros_like(carry.mask))
'''

CODEC = '''
"""Patches of pixels against a codebook of patches."""
import dataclasses
import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from addp_jax import codecs, schema


@dataclasses.dataclass(frozen=True)
class Config(codecs.Config):
    patch: int = schema.field(4, least=1)
    name: str = "patches"

    @property
    def patch_size(self):
        return self.patch


LAYOUT = ((r".*codebook", ("vocab", "replicated")),)


class Tokenizer(nn.Module):
    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config
        self.codebook = self.param("codebook", nn.initializers.uniform(1.0), (config.num_codes, 3 * config.patch**2))

    def features(self, image):
        return rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=self.config.patch, q=self.config.patch)

    def distances(self, features):
        return ((features[:, :, None] - self.codebook[None, None]) ** 2).sum(-1)

    def lookup(self, token_ids):
        return self.codebook[token_ids]

    def encode(self, image):
        return self.distances(self.features(image)).argmin(-1)

    def decode(self, latents):
        config = self.config
        return rearrange(latents, "b (h w) (p q c) -> b (h p) (w q) c", h=config.grid, p=config.patch, q=config.patch)

    def __call__(self, image):
        return self.decode(self.lookup(self.encode(image)))


def init(net, rng):
    return net.init(rng, jnp.zeros((1, net.config.image_size, net.config.image_size, 3)))["params"]


def codec(net, params):
    apply = lambda method: lambda batch: net.apply({"params": params}, batch, method=method)
    return codecs.Codec(apply(net.encode), apply(net.decode), params["codebook"])
'''

FILES = {tasks: ("phases", TASK), sources: ("stripes", SOURCE), samplers: ("at_once", SAMPLER), codecs: ("patches", CODEC)}


@pytest.fixture(scope="module", autouse=True)
def plugins(tmp_path_factory):
    """The four files, each found in its package."""
    folder, patch = tmp_path_factory.mktemp("plugins"), pytest.MonkeyPatch()
    for package, (name, text) in FILES.items():
        place = folder / package.__name__
        place.mkdir()
        (place / f"{name}.py").write_text(text)
        patch.setattr(package, "__path__", [*package.__path__, str(place)])
    yield
    patch.undo()
    for package, (name, _) in FILES.items():
        sys.modules.pop(f"{package.__name__}.{name}", None)


def trained(task, model, workdir, **changes):
    """Train a tiny run; returns its log."""
    fields = modes.tiny(base.run(task, model, steps=4).to_dict())
    fields |= {name: value for name, value in changes.items() if name != "data"}
    fields["data"] |= changes.get("data", {})
    loop.train(modes.split(fields)[0], str(workdir))
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()], fields


def test_a_task_and_a_source(tmp_path):
    from addp_jax.tasks import phases

    log, fields = trained("phases", phases.Config(), tmp_path, data={"source": "stripes"})
    assert "train/loss" in log[0] and any("eval/part/loss" in line for line in log)
    identity = json.loads((tmp_path / "checkpoints" / "identity.json").read_text())
    assert identity["model"] == {"image_size": 16, "weight": 1.0} and identity["data"]["content"].startswith("stripes")
    modes.run("evaluate", *modes.split(fields), str(tmp_path))


def test_a_task_reads_fields_that_only_some_sources_have(tmp_path):
    from addp_jax import errors
    from addp_jax.tasks import phases

    with pytest.raises(errors.UserError, match="config.data.source: its examples have no phase"):
        trained("phases", phases.Config(), tmp_path)


@pytest.mark.medium
def test_a_codec_is_trained_and_generates_with_a_sampler(tmp_path):
    from addp_jax.codecs import patches
    from addp_jax.models import layers, token_predictor
    from addp_jax.samplers import at_once
    from addp_jax.tasks import token_predictor as task

    codec = patches.Config(image_size=16, num_codes=32)
    trained("tokenizer", tokenizer.Config(codec, discriminator_weight=0.0, entropy_weight=0.0), tmp_path / "tokenizer")
    net = token_predictor.Config(layers.TransformerConfig(), layers.TransformerConfig())
    weights = str(tmp_path / "tokenizer")
    model = task.Config(net, codec, tokenizer_weights=weights, sampler=at_once.Config())
    _, fields = trained("token_predictor", model, tmp_path / "predictor")
    assert fields["model"]["sampler"] == {**fields["model"]["sampler"], "name": "at_once", "shift": 0}
    modes.run("generate", *modes.split(fields), str(tmp_path / "predictor"))
    assert np.load(tmp_path / "predictor" / "generated" / "samples.npz")["arr_0"].shape == (4, 16, 16, 3)
    settings = json.loads((tmp_path / "predictor" / "generated" / "settings.json").read_text())
    assert settings["sampler.name"] == "at_once" and settings["tokenizer.name"] == "patches"


def test_an_unknown_name_is_one_line_with_those_there_are():
    fields = base.run("addp", None).to_dict()
    fields["model"]["sampler"]["name"] = "alternatin"
    from addp_jax import errors

    with pytest.raises(errors.UserError, match="config.model.sampler.name: 'alternatin'; use alternating or at_once or token_only"):
        tasks.create("addp", fields["model"], jax.numpy.float32)
