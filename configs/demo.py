"""What the three demo stages share: 48-pixel pictures of 6x6 tokens, sizes for minutes on two CPU cores."""

from configs import base

NUM_CODES, PATCH = 128, 8  # codes; pixels per token
# The output matrix of the heads is not trained: in a short run it must start large enough for sure predictions.
NET = dict(width=128, depth=4, heads=4, decoder_depth=2, decoder_heads=4, num_codes=NUM_CODES, unused=1, dropout=0.0, token_std=0.1)
ENCODER = (NET["width"], NET["depth"], NET["heads"])


def image_size(arg):
    """Pixels: the config's argument (configs/demo_addp.py:96), or 48."""
    return int(arg) if arg.isdecimal() else 48


def length(size):
    return (size // PATCH) ** 2


def tokenizer(size):
    """The same width at all levels: every block keeps its shortcut, which makes a small net learn much faster.
    Codes that start far apart: what looks alike gets one code, not several that no predictor could tell apart."""
    return base.tokenizer(size, 16, (1, 1, 1, 1), NUM_CODES, code_width=8, num_groups=2, num_res_blocks=1, codebook_scale=24.0)


def sized(config, arg):
    return config if arg.isdecimal() else base.sized(config, arg)


def run(task, steps, batch_size, lr, **model):
    """Plain generated shapes, AdamW with a short warm-up. `lr` is the learning rate itself."""
    config = base.run(task, **model)
    config.update(batch_size=batch_size, steps=steps, log_every=20, eval_every=max(steps // 4, 1), eval_batches=8)
    config.data.update(source="shapes", path="", plain=True, crop_scale=(1.0, 1.0), threads=1)
    config.optim.update(base_lr=lr * 256 / batch_size, warmup_steps=min(50, steps // 10), betas=(0.9, 0.98), clip_norm=1.0)
    config.checkpoint.update(every=200)
    return config
