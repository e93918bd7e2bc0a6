"""Stage 2 at real scale: MAGE's token predictor of ViT-B size on ImageNet, 1600 epochs at batch 4096.

Recipe: MAGE's main_pretrain.py. Needs the tokenizer of stage 1 and ImageNet at config.data.path. The released
ViT-B ends at a loss of 5.76; a run of this file has not been made.

    python -m addp_jax.main --config=configs/predictor_vitb.py --workdir=runs/predictor_vitb \\
        --config.model.tokenizer_weights=runs/tokenizer
"""

from configs import base


def get_config(arg=""):
    net = base.predictor(*base.SIZES["vitb"])
    config = base.run("token_predictor", **base.predictor_task(net, base.tokenizer()))
    config.update(epochs=1600.0)
    config.optim.update(base_lr=1.5e-4)
    return base.sized(base.for_pods(config), arg)
