"""Every field of every config, with its unit and where the value comes from.

`run(task, **model)` gives the fields that all runs have, with the defaults of the published pre-training
(ADDP, ICLR 2024; its PyTorch release). The other functions give the blocks of `config.model`.
A config file changes what differs and returns `base.sized(config, arg)`, so that `configs/NAME.py:tiny`
is the same program at a size that trains in seconds.
"""

from ml_collections import ConfigDict

MASK_TOKENS = 1  # last row of a vocabulary
UNUSED_ROWS = 1000  # rows between the codes and the mask token in the released vocabularies, never a target


def run(task: str, **model) -> ConfigDict:
    """All fields of a run of `task`; `model` holds the task's own."""
    return ConfigDict(dict(
        task=task,  # a file in addp_jax/tasks
        model=model,
        init="",  # run folder or weight file that the trained network starts from; "" = random
        seed=0,  # of parameters, masks, dropout, data order
        batch_size=4096,  # images per optimizer step, over all devices
        epochs=0.0,  # passes over the training split; or
        steps=0,  # optimizer steps; exactly one of the two is set
        dtype="auto",  # of the computation: float32 on CPU, bfloat16 elsewhere; parameters are float32
        log_every=50,  # steps
        profile="",  # first of a few steps that TensorBoard's profiler shows, as text: "100"
        eval_every=5000,  # steps
        eval_batches=8,  # batches per evaluation while training, spread over the split; 0 = the whole split
        data=dict(
            source="image_folder",  # shapes | image_folder | meta_list | array_record | tfds
            path="data/imagenet",  # folder; tfds: its data_dir
            name="",  # tfds: name of the data set
            train_split="train",  # sub-folder, list or tfds split
            eval_split="val",
            num_train=0,  # images used; 0 = all (shapes: how many are generated)
            num_eval=0,
            hold_out=True,  # of an image folder without splits, keep one image in twenty for evaluation
            on_unreadable="stop",  # stop with the file's name | skip: take the next readable image, and say so
            crop_scale=(0.2, 1.0),  # area of the random resized crop (release: main_pretrain.py)
            flip=True,  # horizontally, half of the images
            max_objects=1,  # shapes: objects per image
            plain=False,  # shapes: large, upright, one of four colours, on grey
            class_names="",  # file with one class name per line, in label order; "" = as the source knows them
            workers=0,  # processes that decode; 0 = threads only
            threads=16,  # that read, per process
            prefetch=4,  # batches held ready
        ),
        optim=dict(
            optimizer="adamw",  # adamw | lars (optax's, whose momentum holds updates that the learning rate has multiplied)
            base_lr=1e-4,  # at a batch of 256; the learning rate is base_lr * batch_size / 256
            min_lr=0.0,  # at the end of the half cosine
            warmup_epochs=40.0,  # linear from 0; counts where epochs is set
            warmup_steps=0,  # counts where steps is set
            betas=(0.9, 0.95),  # AdamW
            eps=1e-8,
            weight_decay=0.05,
            not_decayed=("bias", "scale"),  # ends of the names of parameters without weight decay
            layer_decay=1.0,  # learning rate of each encoder layer relative to the one above it
            clip_norm=3.0,  # global gradient norm; 0 = off
            accumulate=1,  # micro-batches per step
            ema_decay=0.0,  # of the averaged parameters, below 1; 0 = no average
        ),
        # devices along each axis; one may be -1, the rest; fsdp=-16: as many as divide 16 and what data and tensor leave
        mesh=dict(data=-1, fsdp=1, tensor=1),
        checkpoint=dict(
            every=1000,  # steps
            keep=2,  # newest kept
            keep_every=0,  # and every multiple of this for ever; 0 = none
        ),
        **modes(),
    ))  # fmt: skip


def modes():
    """What --mode=generate, predict, features and robustness read; no training depends on it."""
    return dict(
        generate=dict(
            num_images=64,  # from nothing; of own images: all
            batch_size=64,  # over all devices
            seed=0,
            output="",  # folder; "" = WORKDIR/generated, of a sweep WORKDIR/sweep. It goes on where it was stopped
            strips=4,  # film strips of the denoising steps
            sweep="",  # draw the first images with each of these settings of the sampler: "steps=8,20;temperature=1,6"
            images="",  # folder of own images to edit; "" = from nothing. What of them is drawn anew, one of:
            mask_ratio=1.0,  # this share of the tokens, at random places; 0 = none, the tokenizer's reconstruction
            masks="",  # what is white in the mask of the same name in this folder, or in this one file for all
            margins=(0.0, 0.0, 0.0, 0.0),  # bands left, above, right, below the image; fractions of the canvas
            whole=False,  # the bands around an image that is shrunk, not cropped, until it fits; margins beyond these
            variants=1,  # results per own image
            feather=0,  # pixels; above 0 the own pixels come back outside what was drawn anew, blended over so many
        ),
        predict=dict(  # --mode=predict and --mode=features
            images="",  # folder of own images
            output="",  # folder; "" = WORKDIR/predictions or WORKDIR/features
            batch_size=64,
            format="npz",  # of features: npz | array_record
        ),
        robustness=dict(  # --mode=robustness: folders of the test sets; "" = not measured
            imagenet_a="",  # WNID/*.jpg
            imagenet_r="",  # WNID/*.jpg
            imagenet_sketch="",  # WNID/*.JPEG
            imagenet_c="",  # CORRUPTION/SEVERITY/WNID/*.JPEG
        ),
        evaluate=evaluation(),
    )


def evaluation():
    """`config.evaluate`: distances between the evaluation split and the model's own images, at every evaluation."""
    return dict(
        features="",  # inception, or the work directory of a convnet or addp run; "" = no distances
        inception_weights="",  # pt_inception-2015-12-05-6726825d, .pth or .safetensors
        num_images=2000,  # of the split, spread evenly, and as many of the model's; the names end in it: fid_2k
        batch_size=64,
        seed=0,  # of the samples
    )


def tokenizer(image_size=256, channels=128, multipliers=(1, 1, 2, 2, 4), num_codes=1024, code_width=256, num_groups=32, num_res_blocks=2, codebook_scale=1.0):
    """MaskGIT's VQGAN (released vqgan.yaml): 54.5 M parameters, 16x16 tokens of a 256-pixel image."""
    return dict(
        image_size=image_size,  # pixels
        channels=channels,  # at full resolution
        multipliers=multipliers,  # of the channels, per level; each level after the first halves the resolution
        num_res_blocks=num_res_blocks,  # per level
        num_codes=num_codes,  # K
        code_width=code_width,  # Z
        num_groups=num_groups,  # of every GroupNorm
        codebook_scale=codebook_scale,  # variance of the initial codes, times K; a larger one leaves fewer codes in use
    )


def transformer(width, depth, heads, dropout=0.1):
    return dict(
        width=width,
        depth=depth,  # blocks
        heads=heads,
        mlp_ratio=4,
        dropout=dropout,  # attention weights, attention output, both MLP layers
        drop_path=0.0,  # of the last block, growing linearly from 0
        remat="none",  # none | dots (keep matmul outputs) | full: what the backward pass computes again
    )


SIZES = {  # width, depth, heads of the encoder (ViT-B/16, ViT-L/16)
    "vitb": (768, 12, 12),
    "vitl": (1024, 24, 16),
}


def predictor(width, depth, heads, decoder_depth=8, decoder_heads=16, num_codes=1024, length=256, unused=UNUSED_ROWS, dropout=0.1, token_std=0.02):
    """MAGE's network. Its class slot holds row 76 after the codes, id 1100 of 2025 in the released weights."""
    return dict(
        encoder=transformer(width, depth, heads, dropout),
        decoder=transformer(width, decoder_depth, decoder_heads, dropout),
        num_codes=num_codes,  # K
        vocab_size=num_codes + unused + MASK_TOKENS,  # V
        class_id=num_codes + min(76, unused - 1),  # in the class slot
        length=length,  # L, tokens of an image
        token_std=token_std,  # of the initial token embedding, which also is the output matrix
    )


def pixel_to_token(width, depth, heads, decoder_depth=8, decoder_heads=16, num_codes=1024, image_size=256, patch_size=16, unused=UNUSED_ROWS, dropout=0.1, token_std=0.02):
    """The ADDP network: a ViT encoder over pixels and a token decoder of the same width."""
    encoder = transformer(width, depth, heads, dropout) | dict(
        image_size=image_size,  # pixels
        patch_size=patch_size,  # pixels; one patch per token
        input_dropout=dropout,  # after the input LayerNorm
        input_norm=True,  # LayerNorm between the embeddings and the first block
        final_norm=True,
    )
    return dict(
        encoder=encoder,
        decoder=transformer(width, decoder_depth, decoder_heads, dropout),
        num_codes=num_codes,  # K
        vocab_size=num_codes + unused + MASK_TOKENS,  # V
        token_std=token_std,  # of the initial token embedding, which also is the output matrix
    )


def convnet(image_size, num_classes, patch_size=2, channels=16, multipliers=(1, 2, 4, 4), num_groups=8):
    """A small convolutional classifier."""
    return dict(
        image_size=image_size,  # pixels
        patch_size=patch_size,  # pixels that the first convolution reads as one
        channels=channels,  # of the first level
        multipliers=multipliers,  # of the channels, per level; each level after the first halves the resolution
        num_groups=num_groups,  # of every GroupNorm
        num_classes=num_classes,  # C
    )


def convnet_task(net):
    """`config.model` of the task `convnet`."""
    return dict(
        net=net,
        label_smoothing=0.05,
        noise=0.08,  # standard deviation of the pixel noise on training images, at most
        outliers=0.25,  # share of the training images that are spoiled and belong to no class
    )


def tokenizer_task(net):
    """`config.model` of the task `tokenizer` (MaskGIT's vqgan_config.py)."""
    return dict(
        net=net,
        discriminator=dict(channels=64, max_channels=512),
        l2_weight=1.0,  # of the mean squared error
        l1_weight=0.0,
        codebook_weight=1.0,  # pulls codes to features
        commitment_weight=0.25,  # pulls features to codes
        entropy_weight=0.1,  # each place sure of its code, all codes in use
        entropy_temperature=0.01,  # of the softmax over squared distances
        discriminator_weight=0.1,  # 0 = no discriminator
        r1_weight=10.0,  # gradient penalty of the discriminator
        perceptual_weight=0.1,
        perceptual_weights="",  # torchvision's vgg16 .pth or .safetensors; "" = no perceptual term
        lpips_weights="",  # LPIPS' v0.1/vgg .pth or .safetensors, for the evaluation, with perceptual_weights; "" = no LPIPS
    )


def sampler():
    """How images are drawn; read by --mode=generate, and by evaluations."""
    return dict(
        steps=20,  # T
        schedule="cosine",  # how the masked tokens become fewer, r the share of the steps done:
        # cosine: cos(pi/2 r) | linear: 1 - r | sqrt: 1 - sqrt(r) | constant: L^-r, the same share of what is left per step
        temperature=6.0,  # of the noise on the confidence
        annealed=True,  # to 0; False = constant
        top_p=1.0,  # nucleus of the token draw
        top_k=0,  # codes that are drawn from; 0 = all
    )


def predictor_task(net, tokenizer):
    """`config.model` of the task `token_predictor` (MAGE's main_pretrain.py)."""
    return dict(
        net=net,
        tokenizer=tokenizer,
        tokenizer_weights="",  # run folder or weight file of a tokenizer; "random" for benchmarks
        mask_low=0.5,  # mask ratio ~ normal(mask_mean, mask_std) cut to [mask_low, mask_high]; mask_low is also dropped
        mask_high=1.0,
        mask_mean=0.55,
        mask_std=0.25,
        label_smoothing=0.1,
        sampler=sampler(),  # MAGE: gen_img_uncond.py
        num_samples=16,  # in the evaluation's picture
    )


def addp_task(net, predictor, tokenizer):
    """`config.model` of the task `addp` (the release's main_pretrain.py and main_generate.py)."""
    return dict(
        net=net,
        predictor=predictor,
        tokenizer=tokenizer,
        tokenizer_weights="",  # run folder or weight file of a tokenizer; "random" for benchmarks
        predictor_weights="",  # run folder or weight file of a token predictor; "random" for benchmarks
        masks=dict(
            low=0.5,  # mask ratios are points of a 100-point cosine grid in [low, high)
            high=1.0,
            mean=0.55,  # of the normal density that weights them
            std=0.25,
            max_jump=5,  # grid points between the two nested masks: 1..max_jump
            group=1,  # images that share a ratio (release: the whole batch of a device)
        ),
        teacher_dropout=False,  # True: as in the released training
        label_smoothing=0.1,
        sampler=sampler(),
        num_samples=16,
    )


def for_pods(config):
    """Large models on many devices: parameters divided among 16, matrix products kept for the backward pass, the rest made again."""
    config.mesh.fsdp = -16
    for net in [config.model[name] for name in ("net", "predictor") if name in config.model]:  # the frozen one has no backward pass
        net.encoder.remat = net.decoder.remat = "dots"
    return config


def sized(config, arg):
    """`config` as it is (arg ""), or shrunk to train in seconds on generated images (arg "tiny")."""
    if arg not in ("", "tiny"):
        raise ValueError(f"config argument {arg!r}: use no argument, or :tiny")
    return tiny(config) if arg else config


TINY_VIT = dict(width=16, depth=2, heads=2, image_size=16, patch_size=4)


def tiny(config):
    """The same task, optimizer and data path on 16-pixel pictures of 16 tokens."""
    net = dict(width=16, depth=2, heads=2, decoder_depth=2, decoder_heads=2, num_codes=32, unused=3)
    model = config.model
    small_tokenizer = tokenizer(16, 8, (1, 2, 2), 32, 8, num_groups=4, num_res_blocks=1)
    if config.task == "tokenizer":
        model.net = ConfigDict(small_tokenizer)
        model.discriminator.update(channels=8, max_channels=8)
    elif config.task == "classification":
        model.net.encoder.update(TINY_VIT)
    elif config.task == "linear_probe":
        model.encoder.update(TINY_VIT)
        model.neighbours = 5
    elif config.task == "convnet":
        model.net = ConfigDict(convnet(16, model.net.num_classes, channels=8, multipliers=(1, 2), num_groups=4))
    else:
        model.tokenizer = ConfigDict(small_tokenizer)
        model.num_samples = 4
    if config.task == "token_predictor":
        model.net = ConfigDict(predictor(length=16, **net))
    if config.task == "addp":
        model.net = ConfigDict(pixel_to_token(image_size=16, patch_size=4, **net))
        model.predictor = ConfigDict(predictor(length=16, **net))
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    config.update(batch_size=8, epochs=0.0, steps=4, log_every=1, eval_every=4, eval_batches=1)
    config.data.update(source="shapes", path="", num_train=64, num_eval=16, threads=1)
    config.optim.update(warmup_steps=1, base_lr=1e-2)
    config.checkpoint.update(every=2)
    config.generate.update(num_images=4, batch_size=4, strips=2)
    config.evaluate.update(num_images=16, batch_size=8)
    return config
