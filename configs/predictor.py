"""Stage 2 at real scale: MAGE's token predictor on ImageNet, 1600 epochs at batch 4096. `:b` (ViT-B) or `:l` (ViT-L).

Recipe: MAGE's main_pretrain.py. Needs the tokenizer of stage 1 and ImageNet at config.data.path. The released
ViT-B ends at a loss of 5.76; a run of this file has not been made.

    python -m addp_jax.main --config=configs/predictor.py:l --workdir=runs/predictor_vitl \
        --config.model.tokenizer_weights=runs/tokenizer
"""

from addp_jax.tasks import token_predictor
from configs import base


def get_config(arg="b"):
    nets = base.published(arg)
    config = base.run("token_predictor", token_predictor.Config(nets.predictor(), nets.tokenizer), epochs=1600.0)
    config.optim.base_lr = 1.5e-4
    return base.sized(base.for_pods(config), arg, ("b", "l"))
