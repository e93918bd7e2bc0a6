"""Linear probe and k-NN on the frozen encoder of ADDP, ImageNet-1k at 256 pixels, 90 epochs at batch 4096: `:b` or `:l`.

LEASE (its Table 1) reports 11.5 % top-1 for the ViT-B encoder of ADDP; for ViT-L no published figure is known. A run of
this file has not been made. The features are computed once; few-shot: --config.model.shots=5. Needs a run of
configs/vitb.py or configs/vitl.py and ImageNet.

    python -m addp_jax.main --config=configs/probe.py:b --workdir=runs/vitb_probe \
        --config.model.encoder_weights=runs/vitb --config.data.path=data/imagenet
"""

from addp_jax.tasks import linear_probe
from configs import base


def get_config(arg="b"):
    encoder = base.published(arg).encoder(dropout=0.0, input_dropout=0.0)
    config = base.run("linear_probe", linear_probe.Config(encoder=encoder), batch_size=4096, epochs=90.0, eval_batches=0)
    # MAGE's main_linprobe.py
    base_lr = {"b": 0.1, "l": 0.05}[base.size(arg)]
    config.optim.update(optimizer="lars", base_lr=base_lr, weight_decay=0.0, clip_norm=0.0, warmup_epochs=10.0)
    return base.sized(config, arg, ("b", "l"))
