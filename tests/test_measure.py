"""The command that compares two sets of images, end to end with a small classifier's features."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from addp_jax.measuring import measure
from addp_jax.models import convnet
from addp_jax.weights import checkpoint, feature_nets

pytestmark = pytest.mark.medium

NET = dict(image_size=16, patch_size=2, channels=8, multipliers=(1, 2), num_groups=4, num_classes=8)
SAME = 1e-4  # relative; float32 features of the same images in other batches


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A work directory of the task convnet, untrained."""
    path = tmp_path_factory.mktemp("convnet")
    params = {"convnet": convnet.init(convnet.ConvNet(convnet.Config(**NET)), jax.random.key(0))}
    checkpoint.save_params(path, params, {"model": {"net": NET}})
    return str(path)


def pictures(count, seed=0, size=16):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 256, (count, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    return np.clip(low + rng.normal(0, 20 + 30 * seed, low.shape), 0, 255).astype(np.uint8)


def folder(path, images):
    path.mkdir(exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(path / f"{index:05d}.png")
    return f"{path}"


def archive(path, **arrays):
    np.savez(path, **arrays)
    return f"{path}"


def call(capsys, tmp_path, **options):
    given = {"batch_size": 8, "cache": tmp_path / "cache"} | options
    measure.main([f"--{name}={value}" for name, value in given.items()])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def refused(capsys, tmp_path, **options) -> str:
    given = {"cache": tmp_path / "cache"} | options
    with pytest.raises(SystemExit) as stop:
        measure.main([f"--{name}={value}" for name, value in given.items()])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_everything_is_reported(run_folder, tmp_path, capsys):
    real, samples = folder(tmp_path / "real", pictures(30)), folder(tmp_path / "samples", pictures(21, 1))
    output = tmp_path / "result.json"
    result = call(capsys, tmp_path, real=real, samples=samples, features=run_folder, output=output)
    assert json.loads(output.read_text()) == result
    measures = {"frechet", "class_score", "class_score_std", "kernel", "kernel_std", "precision", "recall", "density", "coverage"}
    assert set(result) == {f"{name}_21" for name in measures} | {"protocol", "seed", "features", "real", "samples"}
    assert result["real"]["images"] == 30 and result["samples"] == result["samples"] | {"images": 21, "size": [16, 16]}
    assert result["features"]["network"] == "convnet" and len(result["features"]["weights"]) == 16
    assert "50,000 ImageNet validation images" in result["protocol"]["reference"]
    assert "samples: 21, not 50000" in result["protocol"]["departures"]


def test_the_result_depends_on_the_images_alone(run_folder, tmp_path, capsys):
    """Not on the batch size, the file names, folder or npz, or whether the reference set was cached."""
    real, samples = pictures(30), pictures(21, 1)
    first = call(
        capsys, tmp_path, real=folder(tmp_path / "real", real), samples=folder(tmp_path / "samples", samples), features=run_folder
    )
    assert len(list((tmp_path / "cache").iterdir())) == 1
    second = call(
        capsys, tmp_path, real=tmp_path / "real", samples=archive(tmp_path / "samples.npz", arr_0=samples),
        features=run_folder, batch_size=16,
    )  # fmt: skip
    assert len(list((tmp_path / "cache").iterdir())) == 1 and second["real"] == first["real"]
    values = [[value for value in result.values() if isinstance(value, float)] for result in (first, second)]
    np.testing.assert_allclose(*values, rtol=SAME)


def test_a_set_against_itself(run_folder, tmp_path, capsys):
    images = archive(tmp_path / "images.npz", arr_0=pictures(30))
    result = call(capsys, tmp_path, real=images, samples=images, features=run_folder)
    assert result["frechet_30"] < 1e-9 and result["precision_30"] == result["recall_30"] == result["coverage_30"] == 1
    assert result["real"]["hash"] == result["samples"]["hash"]


def test_a_changed_image_or_a_damaged_cache_is_noticed(run_folder, tmp_path, capsys):
    real, samples = pictures(30), archive(tmp_path / "samples.npz", arr_0=pictures(21, 1))
    options = dict(real=folder(tmp_path / "real", real), samples=samples, features=run_folder)
    before = call(capsys, tmp_path, **options)
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:1000])
    assert call(capsys, tmp_path, **options) == before
    real[3] = 0
    folder(tmp_path / "real", real)
    after = call(capsys, tmp_path, **options)
    assert after["real"]["hash"] != before["real"]["hash"] and after["frechet_21"] != before["frechet_21"]


def colours(params, image):
    """Stands for Inception: mean colour, its first and last pixel."""
    return {"pool": image.mean((1, 2)), "spatial": image[:, (0, -1), (0, -1)].reshape(len(image), -1)}


def test_adm_uses_the_given_moments(tmp_path, capsys, monkeypatch):
    """With a reference .npz of ADM's form, FID and sFID are against its moments, not against its images."""
    monkeypatch.setattr(feature_nets, "load", lambda *a: feature_nets.FeatureNet("inception", {}, colours, 0, a[2]))
    rng = np.random.default_rng(0)
    moments = {"mu": rng.normal(size=3), "sigma": np.zeros((3, 3)), "mu_s": rng.normal(size=6), "sigma_s": np.zeros((6, 6))}
    real, samples = archive(tmp_path / "virtual.npz", arr_0=pictures(9), **moments), pictures(8, 1)
    result = call(capsys, tmp_path, real=real, samples=archive(tmp_path / "samples.npz", arr_0=samples), protocol="adm")
    rows = colours({}, samples.astype(np.float64))
    for name, mean, kind in (("fid_8", "mu", "pool"), ("sfid_8", "mu_s", "spatial")):
        expected = ((rows[kind].mean(0) - moments[mean]) ** 2).sum() + rows[kind].var(0, ddof=1).sum()
        np.testing.assert_allclose(result[name], expected, rtol=SAME)
    departures = result["protocol"]["departures"]
    assert "VIRTUAL_imagenet256_labeled.npz" in result["protocol"]["reference"] and "real images: 9, not 10000" in departures
    assert not any("moments" in departure or "features" in departure for departure in departures)


def test_mistakes_are_one_line(run_folder, tmp_path, capsys):
    real, few = folder(tmp_path / "real", pictures(4)), folder(tmp_path / "few", pictures(1))
    given = dict(real=real, samples=real, features=run_folder)
    assert "holds 4 images, fewer than the 5 asked for" in refused(capsys, tmp_path, **given, num=5)
    assert "needs at least 2" in refused(capsys, tmp_path, **given | {"samples": few})
    wide = archive(tmp_path / "wide.npz", arr_0=pictures(4)[:, :8])
    assert "16x8 pixels, but --features takes squares" in refused(capsys, tmp_path, **given | {"real": wide})
    assert "--weights is empty" in refused(capsys, tmp_path, real=real, samples=real)
    assert "--weights: " in refused(capsys, tmp_path, real=real, samples=real, weights=tmp_path / "none.safetensors")
    assert "no checkpoint in" in refused(capsys, tmp_path, **given | {"features": real})
    assert "--samples" in refused(capsys, tmp_path, **given | {"samples": tmp_path / "none"})
    taken = tmp_path / "few" / "00000.png"
    assert "--output: cannot write" in refused(capsys, tmp_path, **given, output=taken / "x.json")
    checkpoint.save_params(tmp_path / "other", {"tokenizer": {"codebook": np.zeros((2, 2), np.float32)}}, {})
    assert "neither convnet nor addp" in refused(capsys, tmp_path, **given | {"features": tmp_path / "other"})
    virtual = archive(tmp_path / "v.npz", arr_0=pictures(4), mu=np.zeros(2), sigma=np.eye(2))
    assert "moments are those of Inception" in refused(capsys, tmp_path, **given | {"real": virtual})


def test_a_cache_without_moments_is_made_again_and_a_folder_is_no_output(run_folder, tmp_path, capsys):
    images = archive(tmp_path / "images.npz", arr_0=pictures(30))
    options = dict(real=images, samples=images, features=run_folder)
    before = call(capsys, tmp_path, **options)
    (cached,) = (tmp_path / "cache").iterdir()
    archive(cached, pool=np.zeros((30, 4), np.float32))
    assert call(capsys, tmp_path, **options) == before
    cached.unlink()
    assert "that is a folder" in refused(capsys, tmp_path, **options, output=tmp_path)
    assert not list((tmp_path / "cache").iterdir())  # told before anything is computed
