"""Demo, stage 2 of 3: a small token predictor on the demo tokenizer's tokens. See launch/demo.sh."""

from addp_jax.tasks import token_predictor
from configs import demo


def get_config(arg=""):
    nets = demo.networks(arg)
    model = token_predictor.Config(nets.predictor(), nets.tokenizer, label_smoothing=0.0)
    config = demo.run("token_predictor", model, 1200, 32, 2e-3)
    config.model.sampler.top_p = 0.3  # so short a training leaves doubt in every token
    return demo.sized(config, arg)
