"""ADE20k: the class of every pixel from an ADDP encoder (UperNet). The argument is the size, "b" or "l".

    python -m addp_jax.main --config=configs/ade20k.py:b --workdir=runs/ade20k --config.data.path=ADEChallengeData2016 \
        --config.model.encoder_weights=runs/addp

The recipe of ViT-B is mmsegmentation's (configs/mae, 512x512): 16 images, 160,000 steps. None is known for a ViT-L
from masked pre-training: the learning rate, layer decay, drop path and warm-up are those that mmsegmentation has for
BEiT-L, which sees crops of 640; all else, crops of 512 among it, is ViT-B's, the taps at the same parts of the depth.
Neither was run.
"""

from addp_jax.models import beit, segmenter
from addp_jax.tasks import segmentation
from configs import base

BATCH = 16
RATE = {"b": 1e-4, "l": 2e-5}
OPTIM = {"b": dict(layer_decay=0.65, warmup_steps=1500), "l": dict(layer_decay=0.95, warmup_steps=3000)}


def get_config(arg="b"):
    size = base.size(arg)
    fields = base.SIZES[size]
    encoder = beit.Config(**fields, taps=beit.even_taps(fields["depth"]), drop_path={"b": 0.1, "l": 0.2}[size])
    model = segmentation.Config(segmenter.Config(encoder, channels=fields["width"]))
    config = base.run("segmentation", model, batch_size=BATCH, steps=160_000)
    config.data.update(source="label_maps", path="data/ADEChallengeData2016", train_split="training", eval_split="validation")
    config.data.shift_labels = True
    finetune(config)
    config.optim.update(base_lr=RATE[size] * 256 / BATCH, **OPTIM[size])
    config.eval_every, config.eval_batches = 16_000, 8
    return base.sized(config, arg, ("", *base.SIZES))


def finetune(config):
    """mmsegmentation's optimizer: biases, norms and LayerScale are not decayed, positions and the class token are."""
    config.optim.update(
        schedule="linear", warmup_from=1e-6, betas=(0.9, 0.999), weight_decay=0.05, clip_norm=0.0
    )
