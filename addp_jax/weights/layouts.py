"""Whole weight files: which layout one has, the networks in it, and what must and may be there.

A layout puts networks under prefixes. Each network has its exact names and shapes, found out from the file's own
tensors; beside them only the dead names may be there, which no forward pass reads. They are passed over when reading,
and written as zeros (`token_emb.position_ids`: 0, 1, 2...), because the official code asks for them. A prefix that all
names of a file share (`module.`, `_orig_mod.`, `model.`) is taken off, again and again, if only then a layout is known.

    addp     ADDP: pixel_to_token at the root, vqgan.*, token_predictor.*, and token_predictor.vqgan.*, the same again
    mage     MAGE: token_predictor at the root, and vqgan.*
    vqgan    MAGE's VQGAN: tokenizer at the root
    finetune the release's fine-tuned classifier: classifier at the root
    timm     timm's `vit_base_patch16_224` and `vit_large_patch16_224`, another img_size: the encoder; written only
    maskgit  MaskGIT's JAX tokenizer; read only
    mae      MAE's pre-trained encoder, with or without its decoder; read only

timm: our final LayerNorm is `norm`; our LayerNorm before the first block is `norm_pre`, which timm's models have as an
Identity: `model.norm_pre = torch.nn.LayerNorm(model.embed_dim, eps=1e-6)` before `load_state_dict`. (`pre_norm=True`
would make one, but takes the bias from `patch_embed`.) Its input is normalised with ImageNet's mean and deviation.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
import re
from typing import Callable, NamedTuple

import jax
import numpy as np

from addp_jax import errors, logs, parameters
from addp_jax.codecs import vqgan
from addp_jax.files import printable
from addp_jax.models import heads, layers, pixel_to_token, token_predictor, vit
from addp_jax.weights import maskgit, pytorch, weight_files

SLOW = 2**25  # values; fewer are read in less than a second
MAGE_PATCH = 16  # pixels, of the patch embedding that MAGE's network has but does not use


class Network(NamedTuple):
    """One network under the names of one layout."""

    name: str  # under which a run stores it
    rules: Callable  # our Config -> rules; only a tokenizer's depend on it
    config: Callable  # {their name: shape} -> our Config; what no parameter depends on, such as heads, is made up
    shapes: Callable  # our Config -> abstract parameters
    dead: tuple[str, ...] = ()  # patterns of names that no forward pass reads


class Layout(NamedTuple):
    signature: str  # a tensor that only this layout has
    wrapper: str  # key of the dict around the tensors in a .pth file
    parts: dict[str, Network]  # by prefix


def transformer(shapes: dict, stack: str, width: int) -> dict:
    """Depth and MLP ratio of a stack of blocks; one head, as no shape depends on it."""
    depth = len({name.split(".")[1] for name in shapes if name.startswith(f"{stack}.")})
    return dict(width=width, depth=depth, heads=1, mlp_ratio=shapes[f"{stack}.0.mlp.fc1.weight"][0] // width)


def encoder_config(shapes: dict, **settings) -> vit.Config:
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    grid = math.isqrt(shapes["pos_embed"][1] - 1)
    return vit.Config(**transformer(shapes, "blocks", width), image_size=grid * patch, patch_size=patch, **settings)


def classifier_config(shapes: dict) -> heads.Config:
    return heads.Config(encoder_config(shapes, input_norm=False, final_norm=False), shapes["head.weight"][0])


def addp_config(shapes: dict) -> pixel_to_token.Config:
    encoder = encoder_config(shapes)
    decoder = layers.TransformerConfig(**transformer(shapes, "decoder_blocks", shapes["decoder_embed.weight"][0]))
    return pixel_to_token.Config(encoder, decoder, vocab_size=shapes["token_emb.weight"][0])


def predictor_config(shapes: dict) -> token_predictor.Config:
    vocabulary, width = shapes["token_emb.word_embeddings.weight"]
    encoder = layers.TransformerConfig(**transformer(shapes, "blocks", width))
    decoder = layers.TransformerConfig(**transformer(shapes, "decoder_blocks", shapes["decoder_embed.weight"][0]))
    length = shapes["token_emb.position_embeddings.weight"][0] - 1
    return token_predictor.Config(encoder, decoder, vocab_size=vocabulary, length=length)


def vqgan_config(shapes: dict) -> vqgan.Config:
    pattern = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    blocks = [match for match in map(pattern.fullmatch, shapes) if match]
    levels, each = (len({match[group] for match in blocks}) for group in (1, 2))
    widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(max(levels, 1))]
    channels, codebook = shapes["encoder.conv_in.weight"][0], shapes["quantize.embedding.weight"]
    return pytorch.tokenizer_config(channels, widths, each, codebook)


def our_tokenizer_config(params: dict) -> vqgan.Config:
    """As `vqgan_config`, from our parameters."""
    blocks = [name.split("_")[1:] for name in params["encoder"] if name.startswith("down_")]
    levels, each = (len(set(numbers)) for numbers in zip(*blocks))
    width = lambda part: part["kernel"].shape[-1]
    widths = [width(params["encoder"][f"down_{level}_0"]["conv1"]) for level in range(levels)]
    return pytorch.tokenizer_config(width(params["encoder"]["conv_in"]), widths, each, params["codebook"].shape)


def abstract(module, net: Callable) -> Callable:
    """`Config -> shapes` of the parameters of `net(Config)`."""
    return lambda config: jax.eval_shape(functools.partial(module.init, net(config)), jax.random.key(0))


def encoder_shapes(config: vit.Config) -> dict:
    return {"encoder": jax.eval_shape(functools.partial(vit.init, config), jax.random.key(0))}


ADDP = Network(
    "pixel_to_token", lambda _: pytorch.addp_rules(), addp_config,
    abstract(pixel_to_token, pixel_to_token.PixelToToken), pytorch.ADDP_DEAD,
)  # fmt: skip
PREDICTOR = Network(
    "token_predictor", lambda _: pytorch.predictor_rules(), predictor_config,
    abstract(token_predictor, token_predictor.TokenPredictor), pytorch.PREDICTOR_DEAD,
)  # fmt: skip
VQGAN = Network(
    "tokenizer", pytorch.tokenizer_rules, vqgan_config, abstract(vqgan, vqgan.Tokenizer), pytorch.TOKENIZER_DEAD
)
CLASSIFIER = Network(
    "classifier", lambda _: pytorch.classifier_rules(), classifier_config, abstract(heads, heads.Classifier)
)
MAE = Network(
    "vit", lambda _: pytorch.mae_rules(), functools.partial(encoder_config, input_norm=False), encoder_shapes,
    pytorch.MAE_DEAD,
)  # fmt: skip
VIT = ADDP._replace(rules=lambda _: pytorch.encoder_rules("norm_pre", "encoder"), dead=())
MASKGIT = VQGAN._replace(rules=maskgit.rules, config=maskgit.config, dead=())

READABLE = {
    "addp": Layout("decoder_pos_mask_embed", "model", {
        "": ADDP, "vqgan.": VQGAN, "token_predictor.": PREDICTOR, "token_predictor.vqgan.": VQGAN
    }),
    "mage": Layout("token_emb.word_embeddings.weight", "model", {"": PREDICTOR, "vqgan.": VQGAN}),
    "vqgan": Layout("quantize.embedding.weight", "state_dict", {"": VQGAN}),
    "finetune": Layout("fc_norm.weight", "model", {"": CLASSIFIER}),
    "maskgit": Layout("quantizer/codebook", "", {"": MASKGIT}),
    "mae": Layout("patch_embed.proj.weight", "model", {"": MAE}),  # the last one: others have this tensor, too
}  # fmt: skip
WRITABLE = {name: layout for name, layout in READABLE.items() if name not in ("maskgit", "mae")}
WRITABLE["timm"] = Layout("", "", {"": VIT})


def read(path: str, wanted=None) -> dict[str, dict]:
    """The networks in a weight file: {network: parameters}, all checked, those in `wanted` (default: all) read.

    Raises UserError naming the file and what differs when names or shapes are not exactly those of a layout.
    """
    networks, parts = open_file(path)
    rules = {prefix: check(place(path, prefix), networks[prefix], live) for prefix, live in parts.items()}
    chosen = [prefix for prefix in parts if wanted is None or networks[prefix].name in wanted]
    tensors = [tensor for prefix in chosen for tensor in parts[prefix].values()]
    slow = sum(math.prod(tensor.shape) for tensor in tensors) > SLOW
    progress = logs.Progress(len(tensors), unit="tensor", enabled=slow)
    numbers, results = itertools.count(1), {}
    for prefix in chosen:
        for tensor in parts[prefix].values():
            tensor.on_read = lambda: progress.update(next(numbers), path)
        params = pytorch.from_torch(parts[prefix], rules[prefix])
        name = networks[prefix].name
        if name in results and parameters.content_hash(params) != parameters.content_hash(results[name]):
            raise errors.UserError(f"{path} holds two different networks {name}, one of them under {prefix}*")
        results.setdefault(name, params)
    progress.close()
    return results


def place(path: str, prefix: str) -> str:
    """A part of a file, for messages."""
    return f"{path}: {prefix}*" if prefix else path


def open_file(path: str) -> tuple[dict[str, Network], dict[str, dict]]:
    """({prefix: network}, {prefix: {name after it: tensor}}) in a weight file; no values are read."""
    known = lambda names: any(layout.signature in names for layout in READABLE.values())
    tensors = weight_files.without_prefix(weight_files.read(path), known)
    layout = recognise(path, tensors)
    parts = {prefix: live for prefix, live in split(layout, tensors).items() if live or not prefix}
    return {prefix: layout.parts[prefix] for prefix in parts}, parts


def configs(path: str) -> dict:
    """{network: the Config of its sizes, as its tensors tell} of a weight file; no values are read.

    What no parameter depends on, such as heads, is made up. Raises UserError as `read` does.
    """
    (networks, parts), results = open_file(path), {}
    for prefix, live in parts.items():
        check(place(path, prefix), networks[prefix], live)
        results[networks[prefix].name] = networks[prefix].config({name: tensor.shape for name, tensor in live.items()})
    return results


def recognise(path: str, names) -> Layout:
    for layout in READABLE.values():
        if layout.signature in names:
            return layout
    known = ", ".join(f"{name} ({layout.signature})" for name, layout in READABLE.items())
    raise errors.UserError(f"{path} has none of the tensors by which a layout is known: {known}")


def split(layout: Layout, tensors: dict) -> dict[str, dict]:
    """{prefix: {name after it: tensor}} without the dead ones."""
    prefixes = sorted(layout.parts, key=len, reverse=True)
    parts = {prefix: {} for prefix in layout.parts}
    for name, tensor in tensors.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        rest = name.removeprefix(prefix)
        if not any(fnmatch.fnmatchcase(rest, pattern) for pattern in layout.parts[prefix].dead):
            parts[prefix][rest] = tensor
    return parts


def check(where: str, network: Network, tensors: dict) -> list[pytorch.Rule]:
    """The network's rules; UserError unless `tensors` has exactly its names and shapes. Reads no values."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        if any(0 in shape for shape in shapes.values()):
            raise ValueError
        config = network.config(shapes)
        expected = network.shapes(config)
        # Without this, sizes that only a few tensors of a hostile file claim would be made here.
        if elements(leaf.shape for leaf in jax.tree.leaves(expected)) > 4 * elements(shapes.values()):
            raise ValueError
    except KeyError as error:
        raise errors.UserError(f"{where} is no {network.name}: {error.args[0]} is missing") from error
    except Exception as error:  # sizes that no network has fail wherever it meets them
        problem = "the shapes of its tensors contradict each other"
        raise errors.UserError(f"{where} is no {network.name}: {problem}") from error
    rules = network.rules(config)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), expected)
    named = dict(pytorch.each_to_torch(zeros, rules))
    if lines := parameters.differences(tensors, named, lambda array: printable(str(list(array.shape)), 60)):
        text = printable(parameters.shortened(lines, 6), 400)
        raise errors.UserError(f"{where} does not fit a {network.name}: {text}")
    return rules


def elements(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def arrange(layout: str, networks: dict[str, dict]) -> dict[str, np.ndarray]:
    """All tensors of a file of `layout`, contiguous, dead ones included; `networks` as a run stores them.

    A network that `networks` lacks is left out with its prefix. Raises UserError if one has other parameters than the
    layout has names for.
    """
    arranged, tensors, patch = {}, {}, MAGE_PATCH
    if "tokenizer" in networks:
        patch = 2 ** (len(our_tokenizer_config(networks["tokenizer"]).multipliers) - 1)
    for prefix, network in WRITABLE[layout].parts.items():
        if network.name not in networks:
            continue
        if network.name not in arranged:  # once: the same arrays under each prefix
            arranged[network.name] = arrange_one(network, networks[network.name], patch)
        tensors |= {prefix + name: array for name, array in arranged[network.name].items()}
    return tensors


def arrange_one(network: Network, params: dict, patch: int) -> dict[str, np.ndarray]:
    rules = network.rules(our_tokenizer_config(params) if network.name == "tokenizer" else None)
    known = {path for rule in rules for path in rule.ours}
    names = {name for name in parameters.named_leaves(params) if network is not VIT or name.startswith("encoder/")}
    if known != names:
        text = parameters.shortened(sorted(known ^ names), 6)
        raise errors.UserError(f"this {network.name} has other parameters than the layout has names for: {text}")
    return pytorch.to_torch(params, rules) | dead_tensors(network, params, patch)


def dead_tensors(network: Network, params: dict, patch: int) -> dict[str, np.ndarray]:
    """What no forward pass reads, in the shapes that the official code gives it."""
    if network is ADDP:
        width, positions = params["pos_token"].shape[1], params["pos_token"].shape
        pixels = len(params["encoder"]["patch_embed"]["kernel"])
        shapes = dict.fromkeys(("decoder_pos_embed", "pos_token_embed", "pos_mask_embed"), (1, *positions))
    elif network is PREDICTOR:
        (positions, inner), width = params["pos_embed"].shape, params["decoder_pos"].shape[1]
        pixels = 3 * patch**2
        shapes = {
            "cls_token": (1, 1, inner),
            "pos_embed": (1, positions, inner),
            "mask_token": (1, 1, width),
            "decoder_pos_embed": (1, positions, width),
            "patch_embed.proj.weight": (inner, 3, patch, patch),
            "patch_embed.proj.bias": (inner,),
        }
    else:
        return {}
    shapes |= {"decoder_pred.weight": (pixels, width), "decoder_pred.bias": (pixels,)}
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return zeros | ({"token_emb.position_ids": np.arange(positions)[None]} if network is PREDICTOR else {})
