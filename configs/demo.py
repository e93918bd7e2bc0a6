"""What the three demo stages share: 64-pixel pictures of 8x8 tokens, sizes for minutes on two CPU cores."""

from configs import base

NUM_CODES, LENGTH = 256, 64
NET = dict(width=192, depth=4, heads=6, decoder_depth=2, decoder_heads=6, num_codes=NUM_CODES, unused=1, dropout=0.0)


def tokenizer():
    return base.tokenizer(64, 16, (1, 2, 4, 4), NUM_CODES, 64, num_groups=8, num_res_blocks=1)


def run(task, steps, lr, **model):
    """Generated shapes, a batch of 64, Adam with a short warm-up. `lr` is the learning rate itself."""
    config = base.run(task, **model)
    config.update(batch_size=64, steps=steps, log_every=20, eval_every=max(steps // 3, 1), eval_batches=2)
    config.data.update(source="shapes", path="", crop_scale=(0.8, 1.0), threads=1)
    config.optim.update(base_lr=lr * 256 / 64, warmup_steps=min(50, steps // 10), betas=(0.9, 0.98))
    config.checkpoint.update(every=200)
    return config
