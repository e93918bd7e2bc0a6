"""Demo, stage 3 of 3: ADDP on the demo's tokenizer and token predictor. See launch/demo.sh."""

from configs import base, demo


def get_config(arg=""):
    net = base.pixel_to_token(**demo.NET, image_size=64, patch_size=8)
    model = base.addp_task(net, base.predictor(**demo.NET, length=demo.LENGTH), demo.tokenizer())
    config = demo.run("addp", 600, 2e-3, **model)
    return base.sized(config, arg)
