"""Demo: as configs/demo_probe.py, of the demo token predictor's encoder, which reads tokens: MAGE's features.

    python -m addp_jax.main --config=configs/demo_token_probe.py --workdir=runs/demo/token_probe \
        --config.model.tokenizer_weights=runs/demo/tokenizer --config.model.predictor_weights=runs/demo/predictor
"""

from addp_jax.tasks import token_probe
from configs import demo


def get_config(arg=""):
    nets = demo.networks(arg)
    model = token_probe.Config(predictor=nets.predictor(), tokenizer=nets.tokenizer, num_classes=demo.NUM_CLASSES)
    config = demo.run("token_probe", model, 500, 256, 1e-2)
    config.data.num_train = 4000
    config.optim.weight_decay = 0.0
    config.eval_batches = 0
    return demo.sized(config, arg)
