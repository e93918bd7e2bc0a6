"""Linear probe and k-NN on the frozen ViT-L/16 encoder of ADDP, ImageNet-1k at 256 pixels, 90 epochs at batch 4096.

No published figure is known; a run of this file has not been made. The features are
computed once; few-shot: --config.model.shots=5. Needs a run of configs/vitl.py and ImageNet.

    python -m addp_jax.main --config=configs/vitl_probe.py --workdir=runs/vitl_probe \
        --config.model.encoder_weights=runs/vitl --config.data.path=data/imagenet
"""

from configs import base, recognition


def get_config(arg=""):
    config = base.run("linear_probe", **recognition.probe_task(base.SIZES["vitl"]))
    recognition.probe(config)
    config.optim.base_lr = 0.05
    return base.sized(config, arg)
