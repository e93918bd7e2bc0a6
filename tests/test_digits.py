"""The handwritten digits of scikit-learn as an image folder."""

import numpy as np
import pytest

from addp_jax.data import digits, pipeline, transforms


def test_digits_become_a_folder_that_the_pipeline_reads(tmp_path, capsys):
    folder = str(tmp_path / "digits")
    digits.main(["--output", folder])
    data = pipeline.Config(source="image_folder", path=folder)
    train, held_out = pipeline.open_source(data, "train"), pipeline.open_source(data, "eval")
    assert (len(train), len(held_out)) == (1442, 355)
    assert train.classes == tuple("0123456789")
    labels = np.bincount(held_out.labels)
    assert labels.min() >= 34 and len(labels) == 10
    image = transforms.decode(train[0]["image"], "")
    assert image.shape == (8, 8, 3) and image.max() > 200  # a zero, in white on black
    with pytest.raises(SystemExit) as stopped:
        digits.main(["--output", folder])
    assert stopped.value.code == 2 and "already" in capsys.readouterr().err
