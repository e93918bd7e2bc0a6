"""Fields and recipes of the recognition tasks: fine-tuning and frozen features. `size` is (width, depth, heads)."""

from configs import base


def vit(width, depth, heads, image_size, patch_size, dropout=0.0, norms=True):
    """The encoder by itself."""
    return base.transformer(width, depth, heads, dropout) | dict(
        image_size=image_size,  # pixels; position embeddings of another size are resized
        patch_size=patch_size,  # pixels; that of the encoder's weights
        input_dropout=dropout,  # after the input LayerNorm
        input_norm=norms,  # LayerNorm between the embeddings and the first block
        final_norm=norms,  # LayerNorm after the last block
    )


def classification_task(size, num_classes=1000, image_size=256, patch_size=16, drop_path=0.1):
    """`config.model` of the task `classification` (the release's main_finetune.py): without the encoder's own norms."""
    return dict(
        net=dict(
            encoder=vit(*size, image_size, patch_size, norms=False) | dict(drop_path=drop_path),
            num_classes=num_classes,  # C
            pooling="mean",  # mean (of the patches) | class (the class token)
        ),
        encoder_weights="",  # run folder or weight file of ADDP; "" = train from scratch
        mixup=0.8,  # alpha; 0 = off
        cutmix=1.0,  # alpha; 0 = off
        label_smoothing=0.1,
        augment=dict(
            magnitude=9.0,  # of RandAugment, 0..10; 0 = off
            magnitude_std=0.5,  # drawn anew for every operation
            erase=0.25,  # share of the images with one erased box
        ),
        crop_pct=1.0,  # of the resized short side that the evaluation crops; 0.875 at 224 pixels
    )


def finetune(config):
    """What the release's fine-tuning changes in the optimizer and the crops."""
    config.data.crop_scale = (0.08, 1.0)
    config.optim.update(min_lr=1e-6, betas=(0.9, 0.999), clip_norm=0.0)
    config.optim.not_decayed = ("bias", "scale", "class_token", "pos_embed")


def probe_task(size, num_classes=1000, image_size=256, patch_size=16):
    """`config.model` of the task `linear_probe`; the encoder as it was pre-trained."""
    return dict(
        encoder=vit(*size, image_size, patch_size),
        num_classes=num_classes,  # C
        encoder_weights="",  # run folder or weight file of ADDP; "random" for the chance level
        cache="runs/features",  # folder of the computed features
        block=-1,  # whose output is taken, from 1; -1 = the last, after the final LayerNorm
        pooling="mean",  # mean (of the patches) | class (the class token)
        crop_pct=1.0,  # of the resized short side that the centre crop keeps
        shots=0,  # training examples per class; 0 = all
        shots_seed=0,  # of their choice
        neighbours=20,  # k of the k-NN classifier; 0 = none
        temperature=0.07,  # of its weighted vote
    )


def probe(config):
    """MAGE's optimizer for the linear probe (main_linprobe.py)."""
    config.update(batch_size=4096, epochs=90.0, eval_batches=0)
    config.optim.update(optimizer="lars", weight_decay=0.0, clip_norm=0.0, warmup_epochs=10.0)
