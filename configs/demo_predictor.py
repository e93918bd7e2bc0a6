"""Demo, stage 2 of 3: a small token predictor on the demo tokenizer's tokens. See launch/demo.sh."""

from configs import base, demo


def get_config(arg=""):
    net = base.predictor(**demo.NET, length=demo.LENGTH)
    config = demo.run("token_predictor", 600, 2e-3, **base.predictor_task(net, demo.tokenizer()))
    return base.sized(config, arg)
