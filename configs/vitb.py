"""Stage 3 at real scale: ADDP with ViT-B/16 on ImageNet, 1600 epochs at batch 4096.

Published (PyTorch release): FID 8.9, IS 95.3 unconditional at 256 pixels; 83.9 % top-1 after fine-tuning. A run of
this file has not been made. Needs the tokenizer of stage 1, the ViT-B token predictor of stage 2 and ImageNet.

    python -m addp_jax.main --config=configs/vitb.py --workdir=runs/vitb \
        --config.model.tokenizer_weights=runs/tokenizer --config.model.predictor_weights=runs/predictor_vitb
"""

from configs import addp


def get_config(arg=""):
    return addp.run("b", 1600.0, arg)
