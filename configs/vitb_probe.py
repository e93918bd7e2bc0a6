"""Linear probe and k-NN on the frozen ViT-B/16 encoder of ADDP, ImageNet-1k at 256 pixels, 90 epochs at batch 4096.

LEASE (its Table 1) reports 11.5 % top-1 for ADDP's encoder; a run of this file has not been made. The features are
computed once; few-shot: --config.model.shots=5. Needs a run of configs/vitb.py and ImageNet.

    python -m addp_jax.main --config=configs/vitb_probe.py --workdir=runs/vitb_probe \
        --config.model.encoder_weights=runs/vitb --config.data.path=data/imagenet
"""

from configs import base, recognition


def get_config(arg=""):
    config = base.run("linear_probe", **recognition.probe_task(base.SIZES["vitb"]))
    recognition.probe(config)
    config.optim.base_lr = 0.1
    return base.sized(config, arg)
