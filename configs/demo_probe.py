"""Demo: linear probe and k-NN on the frozen demo encoder, generated shapes. See launch/transfer.sh.

    python -m addp_jax.main --config=configs/demo_probe.py --workdir=runs/demo/probe \
        --config.model.encoder_weights=runs/demo/addp
"""

from addp_jax.tasks import linear_probe
from configs import demo


def get_config(arg=""):
    model = linear_probe.Config(encoder=demo.networks(arg).encoder(), num_classes=demo.NUM_CLASSES)
    config = demo.run("linear_probe", model, 500, 256, 1e-2)
    config.data.num_train = 4000
    config.optim.weight_decay = 0.0
    config.eval_batches = 0
    return demo.sized(config, arg)
