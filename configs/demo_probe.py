"""Demo: linear probe and k-NN on the frozen demo encoder, generated shapes. See launch/transfer.sh.

    python -m addp_jax.main --config=configs/demo_probe.py --workdir=runs/demo/probe \
        --config.model.encoder_weights=runs/demo/addp
"""

from configs import demo, recognition


def get_config(arg=""):
    config = demo.run("linear_probe", 500, 256, 1e-2, **recognition.probe_task(demo.ENCODER, 8, demo.image_size(arg), demo.PATCH))
    config.data.update(num_train=4000)
    config.optim.update(weight_decay=0.0)
    config.update(eval_batches=0)
    return demo.sized(config, arg)
