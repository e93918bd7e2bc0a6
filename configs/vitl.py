"""Stage 3 at real scale: ADDP with ViT-L/16 on ImageNet, 800 epochs at batch 4096.

Published (PyTorch release): FID 7.6, IS 105.1 unconditional at 256 pixels; 85.9 % top-1 after fine-tuning. A run of
this file has not been made. Needs the tokenizer of stage 1, the ViT-L token predictor of stage 2 and ImageNet.

    python -m addp_jax.main --config=configs/vitl.py --workdir=runs/vitl \
        --config.model.tokenizer_weights=runs/tokenizer --config.model.predictor_weights=runs/predictor_vitl
"""

from configs import addp


def get_config(arg=""):
    return addp.run("l", 800.0, arg)
