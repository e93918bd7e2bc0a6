"""Stage 1: train the tokenizer as MaskGIT did: reconstruction, vector quantisation and a discriminator in one scalar.

The scalar holds two games at once. Stop-gradients see to it that the tokenizer's gradient contains nothing of the
discriminator's own terms and the other way round, so that one optimizer step is MaskGIT's simultaneous update of both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from addp_jax import codecs, errors, partition, pictures, schema, tasks
from addp_jax.codecs import vqgan
from addp_jax.metrics import reconstruction
from addp_jax.models import discriminator, perceptual
from addp_jax.ops import images
from addp_jax.weights import feature_nets, torch_nets

LOG_EPS = 1e-5  # MaskGIT's, in the logarithm of the mean code probabilities
NUM_PICTURES = 8  # of the evaluation's reconstruction grid


@schema.config
class Config:
    """Fields of `config.model`; the loss weights are MaskGIT's."""

    net: codecs.Config = vqgan.Config()
    discriminator: discriminator.Config = schema.field(discriminator.Config(), matters=schema.TRAINING)
    l2_weight: float = schema.field(1.0, least=0, matters=schema.TRAINING)
    l1_weight: float = schema.field(0.0, least=0, matters=schema.TRAINING)
    codebook_weight: float = schema.field(1.0, least=0, matters=schema.TRAINING)  # pulls codes to features
    commitment_weight: float = schema.field(0.25, least=0, matters=schema.TRAINING)  # pulls features to codes
    entropy_weight: float = schema.field(0.1, matters=schema.TRAINING)
    entropy_temperature: float = schema.field(0.01, above=0, matters=schema.TRAINING)
    # Of the tokenizer's wish to pass for real; 0 = no discriminator is made at all.
    discriminator_weight: float = schema.field(0.1, least=0, matters=schema.TRAINING)
    r1_weight: float = schema.field(10.0, least=0, matters=schema.TRAINING)  # gradient penalty on real images
    perceptual_weight: float = schema.field(0.1, least=0, matters=schema.TRAINING)
    # torchvision's vgg16 .pth or .safetensors; "" = no perceptual term.
    perceptual_weights: str = schema.field("", matters=schema.NOTHING)
    # LPIPS' v0.1/vgg .pth or .safetensors, for the evaluation, with perceptual_weights; "" = no LPIPS.
    lpips_weights: str = schema.field("", matters=schema.NOTHING)

    def __post_init__(self):
        if self.discriminator_weight:
            try:
                self.discriminator.widths(self.net.image_size)
            except ValueError as error:
                raise ValueError(f"net.image_size: {error}; or set discriminator_weight=0") from error


class Task(tasks.Autoencoder):
    """See `addp_jax.tasks`. Trained parameters: {"tokenizer": ...} and, with a discriminator, {"discriminator": ...}."""

    def __init__(self, config: Config, dtype):
        self.config = config
        self.layout = (*schema.module_of(config.net).LAYOUT, *discriminator.LAYOUT)
        self.image_size = config.net.image_size
        self.dtype = dtype
        self.net = codecs.create(config.net, dtype)
        self.discriminator = discriminator.Discriminator(config.discriminator, dtype) if config.discriminator_weight else None
        self.perceptual = bool(config.perceptual_weights and config.perceptual_weight)
        self._jitted_statistics = jax.jit(self._statistics)

    def init(self, rng):
        tokenizer_rng, discriminator_rng = jax.random.split(rng)
        params = {"tokenizer": codecs.init(self.net, tokenizer_rng)}
        if self.discriminator:
            params["discriminator"] = discriminator.init(self.discriminator, discriminator_rng, self.image_size)
        return params

    def load_frozen(self):
        self._lpips_weights()  # a mistake there is told before the first step
        if not self.perceptual:
            return {}
        path, convert = self.config.perceptual_weights, torch_nets.vgg16_params
        found = feature_nets.read_weights(path, convert, "config.model.perceptual_weights", "torchvision's vgg16")
        return {"perceptual": found}

    def loss(self, params, frozen, batch, rng, train):
        """The scalar and its parts before weighting. It draws no random numbers, and `train` changes nothing."""
        del rng, train
        config = self.config
        image = images.to_unit(batch["image"])
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
        metrics = {"psnr": reconstruction.psnr(image, out["reconstruction"]).mean(), **entropies}
        metrics |= code_statistics(count_codes(out["token_ids"], config.net.num_codes))
        if self.discriminator:
            games, logits = self._games(params["discriminator"], image, out["reconstruction"])
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
        `discriminator` and `r1`, with weights that do not depend on it, reach the discriminator.
        """
        judge = lambda params, image: self.discriminator.apply({"params": params}, image)
        passed = judge(jax.lax.stop_gradient(params), reconstruction)
        fake = judge(params, jax.lax.stop_gradient(reconstruction))
        real, pull_back = jax.vjp(lambda image: judge(params, image), image)
        (slope,) = pull_back(jnp.ones_like(real))
        terms = {
            "adversarial": (self.config.discriminator_weight, jax.nn.softplus(-passed).mean()),
            "discriminator": (1.0, jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()),
            "r1": (self.config.r1_weight, (slope**2).sum((1, 2, 3)).mean()),
        }
        return terms, {"logits_real": real.mean(), "logits_fake": fake.mean()}

    def evaluate(self, params, frozen, batches, source):
        """Exact means over the valid examples of `mse`, `psnr`, `ssim` and, with its weights, `lpips` (of clipped
        reconstructions), and how many codes the whole set uses; the picture has reconstructions below their originals."""
        totals, first = None, None
        lpips = self._lpips_weights()
        for batch in batches:
            sums, shown = jax.device_get(self._jitted_statistics(params, frozen, lpips, batch))
            sums = jax.tree.map(np.float64, sums)
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
            first = shown if first is None else first
        counts, examples = totals.pop("counts"), totals.pop("examples")
        scalars = {name: total / examples for name, total in totals.items()} | code_statistics(counts, np)
        originals, reconstructions, valid = first
        rows = np.concatenate([originals[valid], reconstructions[valid]])
        grid = pictures.grid(rows, columns=int(valid.sum())).astype(np.float32) / 255
        return tasks.Results({name: float(value) for name, value in scalars.items()}, {"reconstructions": grid})

    def _lpips_weights(self) -> list:
        """[] without them. They are read here, not with the frozen weights, as no training depends on them."""
        path = self.config.lpips_weights
        if path and not self.perceptual:
            raise errors.UserError("config.model.lpips_weights needs config.model.perceptual_weights, its VGG16")
        field = "config.model.lpips_weights"
        return feature_nets.read_weights(path, torch_nets.lpips_weights, field, "LPIPS' v0.1/vgg") if path else []

    def _statistics(self, params, frozen, lpips, batch):
        """Sums over the batch's valid examples, and its first images; replicated: every process can read them."""
        image, valid = images.to_unit(batch["image"]), batch["valid"]
        out = self._reconstruct(params, image)
        found = jnp.clip(out["reconstruction"], 0, 1)
        values = {
            "mse": ((found - image) ** 2).mean((1, 2, 3)),
            "psnr": reconstruction.psnr(image, found),
            "ssim": reconstruction.ssim(image, found),
        }
        if lpips:
            values["lpips"] = perceptual.lpips(frozen["perceptual"], lpips, image, found)
        sums = {name: jnp.where(valid, value, 0).sum() for name, value in values.items()}
        sums |= {"examples": valid.sum(), "counts": count_codes(out["token_ids"], self.config.net.num_codes, valid)}
        shown = tuple(array[:NUM_PICTURES] for array in (image, found, valid))
        return partition.replicate((sums, shown))

    def reconstruct(self, params, frozen, image):
        """`image` [B,H,W,3] in [0,1] -> its reconstruction, not clipped."""
        del frozen
        return self.net.apply({"params": params["tokenizer"]}, image)


def squared_gap(one, other):
    return ((one - other) ** 2).mean()


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
