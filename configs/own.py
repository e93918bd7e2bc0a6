"""Your own images: resolution, codebook and size in one place. Copy this file, change its constants, train stage by stage.

    python -m addp_jax.main --config=configs/own.py:tokenizer --workdir=runs/own/tokenizer --config.data.path=FOLDER
    python -m addp_jax.main --config=configs/own.py:predictor --workdir=runs/own/predictor --config.data.path=FOLDER \
        --config.model.tokenizer_weights=runs/own/tokenizer
    python -m addp_jax.main --config=configs/own.py:addp --workdir=runs/own/addp --config.data.path=FOLDER \
        --config.model.tokenizer_weights=runs/own/tokenizer --config.model.predictor_weights=runs/own/predictor
    python -m addp_jax.main --config=configs/own.py:classification --workdir=runs/own/classes --config.data.path=FOLDER \
        --config.model.encoder_weights=runs/own/addp

The recipes are the published ones with fewer steps; a run of this file has not been made.
"""

from addp_jax.codecs import vqgan
from addp_jax.tasks import addp, classification, token_predictor, tokenizer
from configs import base, in1k

IMAGE_SIZE = 128  # pixels
MULTIPLIERS = (1, 1, 2, 4)  # of the tokenizer's channels; each after the first halves the resolution: 8 pixels per token
NUM_CODES = 1024
WIDTH, DEPTH, HEADS = 384, 12, 6  # of the encoders; ViT-S
NUM_CLASSES = 10
BATCH_SIZE, STEPS = 256, 100_000  # of each stage

STAGES = ("tokenizer", "predictor", "addp", "classification")


def get_config(arg="tokenizer"):
    stage = next((part for part in arg.split(",") if part in STAGES), "tokenizer")
    codec = vqgan.Config(image_size=IMAGE_SIZE, num_codes=NUM_CODES, multipliers=MULTIPLIERS)
    nets = base.Networks(codec, WIDTH, DEPTH, HEADS, decoder_depth=4, decoder_heads=HEADS)
    models = {
        "tokenizer": ("tokenizer", lambda: tokenizer.Config(codec)),
        "predictor": ("token_predictor", lambda: token_predictor.Config(nets.predictor(), codec)),
        "addp": ("addp", lambda: addp.Config(nets.pixel_to_token(), nets.predictor(), codec)),
        "classification": ("classification", lambda: classification.Config(nets.classifier(NUM_CLASSES, drop_path=0.1), tokenizer=codec)),
    }
    task, model = models[stage]
    config = base.run(task, model(), batch_size=BATCH_SIZE, steps=STEPS)
    config.data.path = "data/own"
    config.optim.update(base_lr=5e-4, warmup_steps=STEPS // 20)
    if stage == "tokenizer":
        config.optim.update(base_lr=1e-4, betas=(0.0, 0.99), weight_decay=0.0, clip_norm=0.0, ema_decay=0.999)
    if stage == "classification":
        in1k.finetune(config)
        config.optim.layer_decay = 0.75
    return base.sized(config, arg, STAGES)
