"""Demo, stage 3 of 3: ADDP on the demo's tokenizer and token predictor. See launch/demo.sh."""

from addp_jax.tasks import addp
from configs import demo


def get_config(arg=""):
    nets = demo.networks(arg)
    model = addp.Config(nets.pixel_to_token(), nets.predictor(), nets.tokenizer, label_smoothing=0.0)
    config = demo.run("addp", model, 1200, 32, 3e-3)
    # So short a training leaves doubt in every token: surer ones are drawn first, and what the picture says counts more.
    config.model.sampler.update(top_p=0.3, temperature=2.0, guidance=0.8)
    return demo.sized(config, arg)
