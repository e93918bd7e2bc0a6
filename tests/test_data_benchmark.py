"""The input pipeline's benchmark."""

import json

import pytest

from addp_jax.data import benchmark

pytestmark = pytest.mark.medium


def test_benchmark_prints_rates_and_the_cores_they_ask_for(capsys):
    benchmark.main(["--images-per-second", "1000", "--seconds", "0.05"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(row["source"], row["transform"]) for row in rows] == [
        (source, kind) for source in ("image_folder", "array_record") for kind in ("pretrain", "finetune")
    ]
    for row in rows:
        assert row["cores_per_chip"] == pytest.approx(1000 / row["images_per_second_per_core"], rel=0.05)


def test_a_missing_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--input", str(tmp_path / "no"), "--images-per-second", "1"])
    assert stopped.value.code == 2 and "--input" in capsys.readouterr().err
