"""Demo: name every pixel of generated pictures of 96 pixels, up to three shapes in each. Half an hour on two CPU cores.

`--config.model.encoder_weights=` (empty) trains the same network from scratch. From MAGE's encoder,
which reads tokens: the flags in configs/demo_classification.py.

    python -m addp_jax.main --config=configs/demo_segmentation.py --workdir=runs/demo/segmentation \
        --config.model.encoder_weights=runs/demo/addp
"""

from addp_jax.models import beit, segmenter
from addp_jax.tasks import segmentation
from configs import ade20k, demo

SIZE = 96  # pixels


def get_config(arg=""):
    nets = demo.networks(arg)  # whose encoder it takes over
    encoder = beit.Config(
        nets.width, nets.depth, nets.heads, image_size=SIZE, patch_size=nets.tokenizer.patch_size,
        taps=beit.even_taps(nets.depth), input_norm=True, drop_path=0.0,
    )  # fmt: skip
    net = segmenter.Config(
        encoder, channels=32, auxiliary_channels=16, num_classes=1 + demo.NUM_CLASSES, dropout=0.0, logits_std=0.3
    )  # fmt: skip
    # The pictures are endless, so none is changed but by flips.
    model = segmentation.Config(net, tokenizer=nets.tokenizer, scale=(1.0, 1.0), largest_share=1.0, colours=False)
    config = demo.run("segmentation", model, 3000, 16, 3e-3)
    ade20k.finetune(config)
    config.data.update(shapes="full", max_objects=3, num_eval=200, flip=True, threads=1)
    config.optim.update(warmup_steps=50, warmup_from=0.0, clip_norm=1.0)
    config.update(eval_every=750, eval_batches=0)
    return demo.sized(config, arg)
