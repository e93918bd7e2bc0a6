"""Demo, stage 1 of 3: a small tokenizer on generated shapes; minutes on two CPU cores. See launch/demo.sh."""

from addp_jax.tasks import tokenizer
from configs import demo


def get_config(arg=""):
    model = tokenizer.Config(
        demo.networks(arg).tokenizer, l2_weight=3.0, l1_weight=1.0, entropy_weight=0.0, discriminator_weight=0.0
    )  # fmt: skip
    config = demo.run("tokenizer", model, 1100, 8, 5e-3)
    config.optim.weight_decay = 0.0
    return demo.sized(config, arg)
