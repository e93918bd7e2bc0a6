"""Demo, stage 1 of 3: a small tokenizer on generated shapes; minutes on two CPU cores. See launch/demo.sh."""

from configs import base, demo


def get_config(arg=""):
    model = base.tokenizer_task(demo.tokenizer(demo.image_size(arg)))
    config = demo.run("tokenizer", 1100, 8, 5e-3, **model)
    config.model.update(l2_weight=3.0, l1_weight=1.0, entropy_weight=0.0, discriminator_weight=0.0)
    config.optim.update(weight_decay=0.0)
    return demo.sized(config, arg)
