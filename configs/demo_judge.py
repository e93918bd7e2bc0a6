"""Demo: a classifier of the generated shapes, which then judges samples; half a minute on two CPU cores.

    python -m addp_jax.main --config=configs/demo_judge.py --workdir=runs/demo/judge
    python -m addp_jax.measuring.judge --judge=runs/demo/judge --samples=runs/demo/addp/generated/samples.npz
"""

from configs import base, demo


def get_config(arg=""):
    net = base.convnet(demo.image_size(arg), num_classes=8)
    config = demo.run("convnet", 300, 32, 3e-3, **base.convnet_task(net))
    return demo.sized(config, arg)
