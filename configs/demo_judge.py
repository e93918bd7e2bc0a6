"""Demo: a classifier of the generated shapes, which then judges samples; half a minute on two CPU cores.

    python -m addp_jax.main --config=configs/demo_judge.py --workdir=runs/demo/judge
    python -m addp_jax.measuring.judge --judge=runs/demo/judge --samples=runs/demo/addp/generated/samples.npz
"""

from addp_jax.models.convnet import Config
from addp_jax.tasks import convnet
from configs import demo


def get_config(arg=""):
    net = Config(image_size=demo.networks(arg).tokenizer.image_size, num_classes=demo.NUM_CLASSES)
    return demo.sized(demo.run("convnet", convnet.Config(net), 300, 32, 3e-3), arg)
