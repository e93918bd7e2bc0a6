"""Demo: fine-tune the demo's ADDP encoder to name the generated shapes, from ten labels per class.

`--config.model.encoder_weights=` (empty) trains the same network from scratch. See launch/transfer.sh.

    python -m addp_jax.main --config=configs/demo_classification.py --workdir=runs/demo/classification \
        --config.model.encoder_weights=runs/demo/addp
"""

from configs import demo, recognition

NUM_CLASSES, LABELS = 8, 10  # generated shapes; training images of each


def get_config(arg=""):
    model = recognition.classification_task(demo.ENCODER, NUM_CLASSES, demo.image_size(arg), demo.PATCH, drop_path=0.0)
    config = demo.run("classification", 50, 32, 3e-3, **model)
    config.model.net.encoder.update(input_norm=True, final_norm=True)  # so few steps do not make up for lost norms
    config.model.update(mixup=0.0, cutmix=0.0)
    config.model.augment.update(magnitude=0.0, erase=0.0)
    config.data.update(num_train=NUM_CLASSES * LABELS, crop_scale=(1.0, 1.0), flip=False)
    config.optim.update(betas=(0.9, 0.999), layer_decay=0.8)
    config.update(eval_batches=0)
    return demo.sized(config, arg)
