"""Stage 1 at real scale: MaskGIT's VQGAN on ImageNet at 256 pixels (54.5 M parameters and a discriminator).

Recipe: MaskGIT's vqgan_config.py (batch 256, 1 M steps, Adam 1e-4). Its tokenizer reaches rFID 2.28; a run
of this file has not been made. Needs ImageNet at config.data.path.

Departs from MaskGIT's config: there the learning rate is constant, here it rises over 5,000 steps and falls to 0 by a half
cosine; there everything is float32, here the networks, the gradient penalty R1 included, compute in bfloat16 on GPUs
and TPUs (float32: --config.dtype=float32). What either costs has not been measured.

    python -m addp_jax.main --config=configs/tokenizer.py --workdir=runs/tokenizer --config.data.path=...
"""

from addp_jax.tasks import tokenizer
from configs import base


def get_config(arg=""):
    config = base.run("tokenizer", tokenizer.Config(), batch_size=256, steps=1_000_000)
    config.optim.update(base_lr=1e-4, betas=(0.0, 0.99), weight_decay=0.0, clip_norm=0.0, warmup_steps=5000, ema_decay=0.999)
    return base.sized(config, arg)
