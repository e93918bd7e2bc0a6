"""Fine-tune the ViT-L/16 encoder of ADDP on ImageNet-1k at 256 pixels, 50 epochs at batch 1024.

Published (PyTorch release): 85.9 % top-1. A run of this file has not been made. Needs a run of configs/vitl.py and
ImageNet. At 224 pixels: --config.model.net.encoder.image_size=224 --config.model.crop_pct=0.875.

    python -m addp_jax.main --config=configs/vitl_in1k.py --workdir=runs/vitl_in1k \
        --config.model.encoder_weights=runs/vitl --config.data.path=data/imagenet
"""

from configs import base, recognition


def get_config(arg=""):
    config = base.run("classification", **recognition.classification_task(base.SIZES["vitl"], drop_path=0.2))
    recognition.finetune(config)
    config.update(batch_size=1024, epochs=50.0, eval_batches=0)
    config.optim.update(base_lr=0.00025, warmup_epochs=5.0, layer_decay=0.8)
    return base.sized(config, arg)
