"""Demo: fine-tune the demo's ADDP encoder to name the generated shapes, from ten labels per class.

`--config.model.encoder_weights=` (empty) trains the same network from scratch. See launch/transfer.sh.
From MAGE's encoder, which reads tokens: `--config.model.input=tokens --config.model.tokenizer_weights=runs/demo/tokenizer
--config.model.encoder_weights=runs/demo/predictor`.

    python -m addp_jax.main --config=configs/demo_classification.py --workdir=runs/demo/classification \
        --config.model.encoder_weights=runs/demo/addp
"""

from addp_jax.data import augment
from addp_jax.tasks import classification
from configs import demo

LABELS = 10  # training images of each class


def get_config(arg=""):
    # With the encoder's norms: so few steps do not make up for lost ones.
    nets = demo.networks(arg)
    net = nets.classifier(demo.NUM_CLASSES, input_norm=True, final_norm=True)
    model = classification.Config(
        net, tokenizer=nets.tokenizer, mixup=0.0, cutmix=0.0, augment=augment.Config(magnitude=0.0, erase=0.0)
    )  # fmt: skip
    config = demo.run("classification", model, 50, 32, 3e-3)
    config.data.update(num_train=demo.NUM_CLASSES * LABELS, flip=False)
    config.optim.betas = (0.9, 0.999)
    config.eval_batches = 0
    return demo.sized(config, arg)
