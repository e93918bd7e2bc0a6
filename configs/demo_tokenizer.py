"""Demo, stage 1 of 3: a small tokenizer on generated shapes; minutes on two CPU cores. See launch/demo.sh."""

from configs import base, demo


def get_config(arg=""):
    model = base.tokenizer_task(demo.tokenizer())
    config = demo.run("tokenizer", 600, 2e-3, **model)
    config.model.update(adversary_weight=0.0)
    config.optim.update(weight_decay=0.0)
    return base.sized(config, arg)
