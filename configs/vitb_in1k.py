"""Fine-tune the ViT-B/16 encoder of ADDP on ImageNet-1k at 256 pixels, 100 epochs at batch 1024.

Published (PyTorch release): 83.9 % top-1. A run of this file has not been made. Needs a run of configs/vitb.py and
ImageNet. At 224 pixels: --config.model.net.encoder.image_size=224 --config.model.crop_pct=0.875.

    python -m addp_jax.main --config=configs/vitb_in1k.py --workdir=runs/vitb_in1k \
        --config.model.encoder_weights=runs/vitb --config.data.path=data/imagenet
"""

from configs import base, recognition


def get_config(arg=""):
    config = base.run("classification", **recognition.classification_task(base.SIZES["vitb"], drop_path=0.1))
    recognition.finetune(config)
    config.update(batch_size=1024, epochs=100.0, eval_batches=0)
    config.optim.update(base_lr=0.001, warmup_epochs=20.0, layer_decay=0.65)
    return base.sized(config, arg)
