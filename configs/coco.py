"""COCO: boxes and masks from an ADDP encoder (ViTDet's Mask R-CNN). The argument is the size, "b" or "l".

    python -m addp_jax.main --config=configs/coco.py:b --workdir=runs/coco --config.data.path=COCO \
        --config.model.encoder_weights=runs/addp

The recipe is ViTDet's (detectron2, projects/ViTDet): 64 images, 184,375 steps, about 100 epochs. A run of it has not been made.
"""

from addp_jax.models import detector, vitdet
from addp_jax.tasks import detection
from configs import base


def get_config(arg="b"):
    large = base.size(arg) == "l"
    encoder = vitdet.Config(
        **base.SIZES[base.size(arg)], drop_path=0.4 if large else 0.1, remat="dots" if large else "none"
    )
    config = base.run("detection", detection.Config(detector.Config(encoder)), batch_size=64, steps=184_375)
    config.data.update(source="coco", path="data/coco", train_split="instances_train2017", eval_split="instances_val2017")
    finetune(config, layer_decay=0.8 if large else 0.7)
    config.optim.update(base_lr=4e-4, warmup_steps=250)
    config.eval_every, config.eval_batches = 5000, 8
    return base.sized(config, arg, ("", *base.SIZES))


def finetune(config, layer_decay: float):
    """detectron2's optimizer: the norms of the transformer and its positions are not decayed, biases and the rest are."""
    not_decayed = ("norm1/scale", "norm1/bias", "norm2/scale", "norm2/bias", "pos_embed", "input_norm/scale", "input_norm/bias")
    config.optim.update(
        schedule="drops", warmup_from=1e-3, betas=(0.9, 0.999), weight_decay=0.1, not_decayed=not_decayed,
        layer_decay=layer_decay, clip_norm=0.0,
    )  # fmt: skip
