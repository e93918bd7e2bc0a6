"""Fine-tune ADDP's encoder on ImageNet-1k at 256 pixels, batch 1024: 100 epochs of ViT-B/16 (`:b`) or 50 of ViT-L/16 (`:l`).

Published (PyTorch release): 83.9 % (B) and 85.9 % (L) top-1. A run of this file has not been made. Needs a run of
configs/vitb.py or configs/vitl.py and ImageNet. At 224 pixels: --config.model.net.encoder.image_size=224
--config.model.crop_pct=0.875.

    python -m addp_jax.main --config=configs/in1k.py:l --workdir=runs/vitl_in1k \
        --config.model.encoder_weights=runs/vitl --config.data.path=data/imagenet
"""

from addp_jax.tasks import classification
from configs import base

RECIPES = {  # epochs, drop path, base learning rate, epochs of warm-up, layer decay (the release's main_finetune.py)
    "b": (100.0, 0.1, 0.001, 20.0, 0.65),
    "l": (50.0, 0.2, 0.00025, 5.0, 0.8),
}


def get_config(arg="b"):
    epochs, drop_path, base_lr, warmup, layer_decay = RECIPES[base.size(arg)]
    net = base.published(arg).classifier(1000, drop_path=drop_path)
    config = base.run("classification", classification.Config(net), batch_size=1024, epochs=epochs, eval_batches=0)
    finetune(config)
    config.optim.update(base_lr=base_lr, warmup_epochs=warmup, layer_decay=layer_decay)
    return base.sized(config, arg, ("b", "l"))


def finetune(config):
    """What the release's fine-tuning changes in the optimizer and the crops, at any size."""
    config.data.crop_scale = (0.08, 1.0)
    not_decayed = ("bias", "scale", "class_token", "pos_embed")
    config.optim.update(min_lr=1e-6, betas=(0.9, 0.999), clip_norm=0.0, not_decayed=not_decayed)
