"""Demo, stage 2 of 3: a small token predictor on the demo tokenizer's tokens. See launch/demo.sh."""

from configs import base, demo


def get_config(arg=""):
    size = demo.image_size(arg)
    net = base.predictor(**demo.NET, length=demo.length(size))
    config = demo.run("token_predictor", 1200, 32, 3e-3, **base.predictor_task(net, demo.tokenizer(size)))
    config.model.label_smoothing = 0.0
    config.model.sampler.top_p = 0.3  # so short a training leaves doubt in every token
    return demo.sized(config, arg)
