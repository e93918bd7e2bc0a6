"""What the demo's stages share: 48-pixel pictures of 6x6 tokens, sizes for minutes on two CPU cores.

The argument of these configs is another size in pixels, or "textured": launch/miniature.sh's harder pictures.
"""

from addp_jax.codecs import vqgan
from configs import base

NUM_CLASSES = 8  # of generated shapes
TEXTURED = "textured"


def networks(arg: str) -> base.Networks:
    """Pixels: the config's argument (configs/demo_addp.py:96), or 48; of textured pictures 64, and more codes."""
    textured = TEXTURED in arg.split(",")
    size = int(arg) if arg.isdecimal() else 64 if textured else 48
    # The same width at all levels: every block keeps its shortcut, which makes a small net learn much faster.
    # Codes that start far apart: what looks alike gets one code, not several that no predictor could tell apart.
    tokenizer = vqgan.Config(
        image_size=size, num_codes=512 if textured else 128, channels=16, multipliers=(1, 1, 1, 1), num_res_blocks=1,
        code_width=8, num_groups=2, codebook_scale=24.0,
    )  # fmt: skip
    # The output matrix of the heads is not trained: in a short run it must start large enough for sure predictions.
    # Where a patch lies and what its edges look like must tell from the start: the mean colours drown both otherwise.
    return base.Networks(
        tokenizer, 128, 4, 4, decoder_depth=2, decoder_heads=4, dropout=0.0, token_std=0.1, pos_std=0.5, colour_scale=0.1, unused=1
    )  # fmt: skip


def run(task, model, steps, batch_size, lr):
    """Plain generated shapes, AdamW with a short warm-up. `lr` is the learning rate itself."""
    config = base.run(task, model, batch_size=batch_size, steps=steps, log_every=20, eval_every=max(steps // 4, 1))
    config.data.update(source="shapes", path="", shapes="plain", crop_scale=(1.0, 1.0), threads=1)
    config.optim.update(base_lr=lr * 256 / batch_size, warmup_steps=min(50, steps // 10), betas=(0.9, 0.98), clip_norm=1.0)
    config.checkpoint.every = 200
    return config


def sized(config, arg):
    if arg.isdecimal():
        return config
    if TEXTURED in arg.split(","):
        config.data.shapes = TEXTURED
    return base.sized(config, arg, ("", TEXTURED))
