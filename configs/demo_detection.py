"""Demo: find the generated shapes, several in a picture of 128 pixels: boxes, masks and names. Half an hour on two CPU cores.

`--config.model.encoder_weights=` (empty) trains the same network from scratch. From MAGE's encoder,
which reads tokens: the flags in configs/demo_classification.py.

    python -m addp_jax.main --config=configs/demo_detection.py --workdir=runs/demo/detection \
        --config.model.encoder_weights=runs/demo/addp
"""

from addp_jax.models import detector, vitdet
from addp_jax.tasks import detection
from configs import coco, demo

SIZE = 128  # pixels


def get_config(arg=""):
    nets = demo.networks(arg)  # whose encoder it takes over
    encoder = vitdet.Config(
        nets.width, nets.depth, nets.heads, image_size=SIZE, patch_size=nets.tokenizer.patch_size,
        pretrain_size=nets.tokenizer.image_size, window=8, global_blocks=2, input_norm=True, drop_path=0.0,
    )  # fmt: skip
    net = detector.Config(encoder, channels=32, box_width=128, num_classes=demo.NUM_CLASSES)
    model = detection.Config(
        net, tokenizer=nets.tokenizer, max_objects=8, mask_size=56, jitter=(0.7, 1.4),
        anchor_sizes=(16.0, 32.0, 64.0, 128.0, 256.0),
        rpn_samples=64, roi_samples=64, train_best=256, train_proposals=128, best=256, proposals=64, detections=32,
    )  # fmt: skip
    config = demo.run("detection", model, 1600, 8, 1e-3)
    coco.finetune(config, layer_decay=1.0)
    config.data.update(shapes="full", max_objects=5, num_eval=500, flip=True, threads=2)
    config.optim.update(warmup_steps=100, weight_decay=0.05, clip_norm=1.0, schedule="cosine", warmup_from=0.0)
    config.update(eval_every=400, eval_batches=8)
    return demo.sized(config, arg)
