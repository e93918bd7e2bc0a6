"""Demo, stage 3 of 3: ADDP on the demo's tokenizer and token predictor. See launch/demo.sh."""

from configs import base, demo


def get_config(arg=""):
    size = demo.image_size(arg)
    net = base.pixel_to_token(**demo.NET, image_size=size, patch_size=demo.PATCH)
    model = base.addp_task(net, base.predictor(**demo.NET, length=demo.length(size)), demo.tokenizer(size))
    config = demo.run("addp", 1200, 32, 3e-3, **model)
    config.model.label_smoothing = 0.0
    config.model.sampler.top_p = 0.3  # so short a training leaves doubt in every token
    return demo.sized(config, arg)
