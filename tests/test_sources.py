"""No picture is listed twice, however the folders overlap."""

import numpy as np
import pytest

from dvmsr_jax import images
from dvmsr_jax.config import DataConfig
from dvmsr_jax.data.sources import find_sources


@pytest.fixture
def photos(tmp_path):
    """Six pictures, two of them in a subfolder."""
    rng = np.random.default_rng(0)
    for i in range(6):
        picture = rng.integers(0, 256, (40, 50, 3), np.uint8)
        images.write_png(tmp_path / "photos" / ("more" if i < 2 else "") / f"{i}.png", picture)
    return tmp_path / "photos"


def find(*folders):
    return find_sources(DataConfig(hr_dirs=folders, val_images=2))


def fingerprints(splits):
    return {name: [source.fingerprint for source in split] for name, split in splits.items()}


def test_overlapping_folders_list_a_picture_once(photos, tmp_path, capsys):
    """A folder with its subfolder, with itself, with a link to it, and with a link to a file."""
    expected = fingerprints(find(photos))
    assert sum(map(len, expected.values())) == 6
    assert "dropped" not in capsys.readouterr().out
    (tmp_path / "link").symlink_to(photos)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").symlink_to(photos / "3.png")
    for other, dropped in [("photos/more", 2), ("photos", 6), ("link", 6), ("linked", 1)]:
        splits = find(photos, tmp_path / other)
        assert fingerprints(splits) == expected
        assert not {s.name for s in splits["train"]} & {s.name for s in splits["val"]}
        assert f"dropped {dropped} of {6 + dropped} pictures" in capsys.readouterr().out


def test_copies_are_listed_once(photos, tmp_path, capsys):
    """In one folder or two, under any names."""
    expected = fingerprints(find(photos))
    for name in ("x/0.png", "x/renamed.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((photos / "more" / "0.png").read_bytes())
    assert fingerprints(find(photos, tmp_path / "x")) == expected
    assert "dropped 2 of 8 pictures" in capsys.readouterr().out


def test_a_difference_outside_of_the_sample_counts(photos, capsys):
    """Files of equal size that agree in the middle, which is sampled, but not at the end."""
    picture = np.random.default_rng(1).integers(0, 256, (90, 90, 3), np.uint8)
    images.write_png(photos / "a.png", picture)
    content = bytearray((photos / "a.png").read_bytes())
    content[-1] ^= 1
    (photos / "b.png").write_bytes(content)
    assert sum(map(len, find(photos).values())) == 8
    assert "dropped" not in capsys.readouterr().out
