"""Stage 1: train the tokenizer as MaskGIT did: reconstruction, vector quantisation and an adversary in one scalar.

The scalar holds two games at once. Stop-gradients see to it that the tokenizer's gradient contains nothing of the
adversary's own terms and the other way round, so that one optimizer step is MaskGIT's simultaneous update of both.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from addp_jax import errors, partition, tasks, writers
from addp_jax.data import pipeline
from addp_jax.models import adversary, perceptual, tokenizer

LOG_EPS = 1e-5  # MaskGIT's, in the logarithm of the mean code probabilities
MSE_FLOOR = 1e-10  # caps the PSNR at 100 dB
NUM_PICTURES = 8  # of the evaluation's reconstruction grid


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.model`; the loss weights are MaskGIT's."""

    net: tokenizer.Config = tokenizer.Config()
    adversary: adversary.Config = adversary.Config()
    l2_weight: float = 1.0
    l1_weight: float = 0.0
    codebook_weight: float = 1.0  # pulls codes to features
    commitment_weight: float = 0.25  # pulls features to codes
    entropy_weight: float = 0.1
    entropy_temperature: float = 0.01
    adversary_weight: float = 0.1  # of the tokenizer's wish to pass for real; 0 = no adversary is made at all
    r1_weight: float = 10.0  # gradient penalty of the adversary on real images
    perceptual_weight: float = 0.1
    perceptual_weights: str = ""  # torchvision's vgg16 as a .safetensors file; "" = no perceptual term


class Task:
    """See `addp_jax.tasks`. Trained parameters: {"tokenizer": ...} and, with an adversary, {"adversary": ...}."""

    def __init__(self, config: Config, dtype):
        check(config)
        self.config = config
        self.image_size = config.net.image_size
        self.image_size = config.net.image_size
        self.dtype = dtype
        self.net = tokenizer.Tokenizer(config.net, dtype)
        self.adversary = adversary.Adversary(config.adversary, dtype) if config.adversary_weight else None
        self.perceptual = bool(config.perceptual_weights and config.perceptual_weight)
        self._jitted_statistics = jax.jit(self._statistics)

    def init(self, rng):
        tokenizer_rng, adversary_rng = jax.random.split(rng)
        params = {"tokenizer": tokenizer.init(self.net, tokenizer_rng)}
        if self.adversary:
            params["adversary"] = adversary.init(self.adversary, adversary_rng, self.image_size)
        return params

    def load_frozen(self):
        return {"perceptual": load_vgg16(self.config.perceptual_weights)} if self.perceptual else {}

    def loss(self, params, frozen, batch, rng, train):
        """The scalar and its parts before weighting. It draws no random numbers, and `train` changes nothing."""
        del rng, train
        config = self.config
        image = to_unit(batch["image"])
        out = self._reconstruct(params, image)
        error = out["reconstruction"] - image
        entropy, entropies = entropy_loss(out["distances"], config.entropy_temperature)
        terms = {
            "mse": (config.l2_weight, (error**2).mean()),
            "mae": (config.l1_weight, jnp.abs(error).mean()),
            "codebook": (config.codebook_weight, squared_gap(out["codes"], jax.lax.stop_gradient(out["features"]))),
            "commitment": (config.commitment_weight, squared_gap(out["features"], jax.lax.stop_gradient(out["codes"]))),
            "entropy": (config.entropy_weight, entropy),
        }
        if self.perceptual:
            distances = perceptual.distance(frozen["perceptual"], image, out["reconstruction"], self.dtype)
            terms["perceptual"] = (config.perceptual_weight, distances.mean())
        metrics = {"psnr": psnr(image, out["reconstruction"]).mean(), **entropies}
        metrics |= code_statistics(count_codes(out["token_ids"], config.net.num_codes))
        if self.adversary:
            games, logits = self._games(params["adversary"], image, out["reconstruction"])
            terms |= games
            metrics |= logits
        loss = sum(weight * value for weight, value in terms.values())
        return loss, {"loss": loss, **{name: value for name, (_, value) in terms.items()}, **metrics}

    def _reconstruct(self, params, image):
        """Everything between an image [B,H,W,3] and its reconstruction, through the straight-through estimator."""

        def forward(net, image):
            features = net.features(image)
            distances = net.distances(features)
            token_ids = jnp.argmin(distances, axis=-1)
            codes = net.lookup(token_ids)
            latents = features + jax.lax.stop_gradient(codes - features)
            names = ("features", "distances", "token_ids", "codes", "reconstruction")
            return dict(zip(names, (features, distances, token_ids, codes, net.decode(latents))))

        return self.net.apply({"params": params["tokenizer"]}, image, method=forward)

    def _games(self, params, image, reconstruction):
        """Both players' terms as {name: (weight, value)}, and the mean logits.

        The non-saturating game and R1 (arXiv:1801.04406) on real images. Only `adversarial` reaches the tokenizer;
        `discriminator` and `r1`, with weights that do not depend on it, reach the adversary.
        """
        judge = lambda params, image: self.adversary.apply({"params": params}, image)
        passed = judge(jax.lax.stop_gradient(params), reconstruction)
        fake = judge(params, jax.lax.stop_gradient(reconstruction))
        real, pull_back = jax.vjp(lambda image: judge(params, image), image)
        (slope,) = pull_back(jnp.ones_like(real))
        terms = {
            "adversarial": (self.config.adversary_weight, jax.nn.softplus(-passed).mean()),
            "discriminator": (1.0, jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()),
            "r1": (self.config.r1_weight, (slope**2).sum((1, 2, 3)).mean()),
        }
        return terms, {"logits_real": real.mean(), "logits_fake": fake.mean()}

    def evaluate(self, params, frozen, batches):
        """Exact means over the valid examples of `mse` and `psnr` (of clipped reconstructions), and how many codes
        the whole set uses; the picture has reconstructions below their originals."""
        del frozen
        totals, pictures = None, None
        for batch in batches:
            sums, shown = jax.device_get(self._jitted_statistics(params, batch))
            sums = jax.tree.map(np.float64, sums)
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
            pictures = shown if pictures is None else pictures
        scalars = {name: totals[name] / totals["examples"] for name in ("mse", "psnr")}
        scalars |= code_statistics(totals["counts"], np)
        originals, reconstructions, valid = pictures
        rows = np.concatenate([originals[valid], reconstructions[valid]])
        grid = writers.grid(rows, columns=int(valid.sum())).astype(np.float32) / 255
        return {name: float(value) for name, value in scalars.items()}, {"reconstructions": grid}

    def _statistics(self, params, batch):
        """Sums over the batch's valid examples, and its first images; replicated: every process can read them."""
        image, valid = to_unit(batch["image"]), batch["valid"]
        out = self._reconstruct(params, image)
        reconstruction = jnp.clip(out["reconstruction"], 0, 1)
        total = lambda values: jnp.where(valid, values, 0).sum()
        sums = {
            "mse": total(((reconstruction - image) ** 2).mean((1, 2, 3))),
            "psnr": total(psnr(image, reconstruction)),
            "examples": valid.sum(),
            "counts": count_codes(out["token_ids"], self.config.net.num_codes, valid),
        }
        shown = tuple(array[:NUM_PICTURES] for array in (image, reconstruction, valid))
        return jax.tree.map(lambda array: partition.constrain(array, *[None] * array.ndim), (sums, shown))

    def transform(self, split: str, data: pipeline.Config):
        return tasks.image_transform(split, data, self.image_size)


def check(config: Config):
    """Raises UserError on sizes that do not fit together."""
    net = config.net
    if net.image_size % net.patch_size:
        raise errors.UserError(
            f"config.model.net.image_size: {net.image_size} is not a multiple of {net.patch_size}, "
            f"the pixels per token of {len(net.multipliers)} multipliers"
        )
    for multiplier in net.multipliers:
        if net.channels * multiplier % net.num_groups:
            raise errors.UserError(
                f"config.model.net.num_groups: {net.num_groups} does not divide {net.channels} x {multiplier} channels"
            )
    if config.adversary_weight:
        try:
            config.adversary.widths(net.image_size)
        except ValueError as error:
            raise errors.UserError(f"config.model.net.image_size: {error}; or set adversary_weight=0") from error


def load_vgg16(path: str) -> dict:
    """Parameters of `perceptual.Vgg16` from a .safetensors file with torchvision's names.

    Raises UserError if the file cannot be read or does not fit.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = [name for name in file.keys() if name.startswith("features.")]
            return perceptual.params_from_torchvision({name: file.get_tensor(name) for name in names})
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise errors.UserError(
            f"config.model.perceptual_weights: {path}: {reason}; "
            'give torchvision\'s vgg16 as .safetensors, or "" for none'
        ) from error


def to_unit(image):
    """uint8 [B,H,W,3] -> float32 in [0,1]."""
    return image.astype(jnp.float32) / 255


def squared_gap(one, other):
    return ((one - other) ** 2).mean()


def psnr(image, reconstruction):
    """Peak signal-to-noise ratio in dB of each (clipped) image, [B]; at most 100."""
    mse = ((jnp.clip(reconstruction, 0, 1) - image) ** 2).mean((1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(mse, MSE_FLOOR))


def entropy_loss(distances, temperature: float):
    """MaskGIT's: every place sure of its code, all codes in use. (mean entropy - entropy of the mean, both in nats).

    `distances` float32 [B,L,K]. The mean is over the global batch; MaskGIT took it on each device by itself.
    """
    logits = -distances / temperature
    probs = jax.nn.softmax(logits)
    each = -(probs * jax.nn.log_softmax(logits)).sum(-1).mean()
    mean = probs.mean((0, 1))
    together = -(mean * jnp.log(mean + LOG_EPS)).sum()
    return each - together, {"entropy_each": each, "entropy_mean": together}


def count_codes(token_ids, num_codes: int, valid=None):
    """How often each code occurs in `token_ids` [B,L], of the `valid` [B] examples only: int32 [K]."""
    weights = jnp.ones(token_ids.shape, jnp.int32)
    if valid is not None:
        weights = weights * valid[:, None]
    return jnp.zeros(num_codes, jnp.int32).at[token_ids].add(weights)


def code_statistics(counts, xp=jnp):
    """`codebook_usage`: fraction of the codes that occur; `perplexity`: exp of their frequencies' entropy, 1..K."""
    share = counts / counts.sum()
    entropy = -(share * xp.log(xp.where(share > 0, share, 1))).sum()
    return {"codebook_usage": (counts > 0).mean(), "perplexity": xp.exp(entropy)}
