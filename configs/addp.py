"""Stage 3, what configs/vitb.py and configs/vitl.py share."""

from addp_jax.tasks import addp
from configs import base


def run(size: str, epochs: float, arg: str):
    nets = base.published(size)
    config = base.run("addp", addp.Config(nets.pixel_to_token(), nets.predictor(), nets.tokenizer), epochs=epochs)
    return base.sized(base.for_pods(config), arg)
