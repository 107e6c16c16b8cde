"""Weights with names: the project's own, in `checkpoints/`, and the published ones."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dvmsr_jax import files
from dvmsr_jax.downloads import Remote, obtaining
from dvmsr_jax.errors import UserError
from dvmsr_jax.kernels import user_cache

_FOLDER = Path(__file__).parent / "checkpoints"


class RegistryError(UserError):
    """Named weights are missing or damaged, or their name is ambiguous."""


@dataclass(frozen=True)
class Named:
    """Weights that have a name."""

    scale: int
    """Upscaling factor."""
    purpose: str
    """What they are for, and what they were made from."""
    sha256: str
    """SHA-256 of the file, in hex digits."""
    scores: Mapping[str, tuple[float, float]]
    """PSNR-Y in dB and SSIM-Y, by benchmark."""
    url: str | None = None
    """Where to download the file. None: it is NAME.safetensors in `checkpoints/`."""


NAMED: Mapping[str, Named] = {
    "x4": Named(
        scale=4,
        purpose="clean pictures, the default; the published weights, fine-tuned",
        sha256="ea0ff80abc30fca143507a17ad1d731f3b7620f985cea4b53804315ac24bdcd5",
        scores={"Set5": (32.245, 0.8957), "Set14": (28.626, 0.7819)},
    ),
    "x3": Named(
        scale=3,
        purpose="clean pictures; x4 with a new last convolution, fine-tuned",
        sha256="dd2c317e5187b7139fddf6b96c6e43507c46888cf03c9b8a26e7f0ecfd085fb4",
        scores={"Set5": (34.239, 0.9258), "Set14": (30.251, 0.8400)},
    ),
    "x2": Named(
        scale=2,
        purpose="clean pictures; x4 with a new last convolution, fine-tuned",
        sha256="fada8d6af3443c7617508e66295e307c12c238f440e86925da46e74fc24083c5",
        scores={"Set5": (37.876, 0.9601), "Set14": (33.453, 0.9167)},
    ),
    "x4-real": Named(
        scale=4,
        purpose="blurred, noisy or compressed photographs; x4, fine-tuned on mild degradations",
        sha256="f4cf37566de6da6e900ae918b7accbf795100d1c06f340c4e707cfc1025bdd81",
        scores={"Set5": (31.557, 0.8883), "Set14": (28.241, 0.7707)},
    ),
    "x4-scratch": Named(
        scale=4,
        purpose="clean pictures; trained by this project from random weights",
        sha256="734fa8abb474a645e0cbf4f15b23a57bdc0bc1fa8e72c998cefa5e7a0feb8b0e",
        scores={"Set5": (30.637, 0.8689), "Set14": (27.638, 0.7576)},
    ),
    "published": Named(
        scale=4,
        purpose="clean pictures; the paper's authors' own weights, downloaded on first use",
        sha256="37ff9ece556b84e2aa63533d0d1a0ee27ab63cc6a46d4df8f6bfa16e325d34fe",
        scores={"Set5": (32.184, 0.8946), "Set14": (28.609, 0.7816)},
        url="https://raw.githubusercontent.com/Amazingren/NTIRE2024_ESR/"
        "4dcc6540246d258f994099b28f7905ea14dc3a44/model_zoo/team07_DVMSR.pth",
    ),
}

DEFAULT = "x4"


def default_for(scale: int | float | None) -> str:
    """The name of the weights for enlarging clean pictures by a factor.

    Without weights for that factor, DEFAULT: its results are then resized.
    """
    name = DEFAULT if scale is None else f"x{scale:g}"
    return name if name in NAMED else DEFAULT


def find(source: str | os.PathLike[str]) -> Path:
    """Finds the file or folder of weights, and downloads it if necessary.

    Args:
        source: a name in NAMED, or a path.

    Raises:
        RegistryError: a file has the same name, or the weights are missing or damaged.
        DownloadError: they cannot be downloaded.
    """
    name = os.fspath(source)
    if (named := NAMED.get(name)) is None:
        return Path(source).expanduser()
    if os.path.lexists(name):
        raise RegistryError(
            f"{name}: is a name of weights, but there is also {Path(name).absolute()}; pass the "
            "full path to use that, or rename it"
        )
    if named.url is not None:
        return _downloaded(named, Remote(named.url, sha256=named.sha256))
    path = _FOLDER / f"{name}.safetensors"
    if not path.exists():
        raise RegistryError(
            f"{path}: the weights named {name} are missing; restore the file, or pass the path of "
            "other weights"
        )
    if files.checksum(path) != named.sha256:
        raise RegistryError(f"{path}: is not the file named {name}; restore it, or pass a path")
    return path


def _downloaded(named: Named, remote: Remote) -> Path:
    try:
        folder = user_cache.folder() / "weights"
        path = folder / remote.name
        folder.mkdir(exist_ok=True)
        with files.turn(folder / ".lock"):
            if not path.exists() or files.checksum(path) != named.sha256:
                with obtaining(remote, folder) as complete:
                    os.replace(complete, path)
    except OSError as error:
        raise RegistryError(
            f"{remote.name} cannot be saved in the cache ({error}); set XDG_CACHE_HOME to another "
            "folder"
        ) from error
    return path


def describe() -> str:
    """A line for each name: scale, scores and purpose."""
    return "\n".join(
        f"{name:12} x{named.scale}  "
        + "  ".join(f"{on} {psnr_y:.3f} dB" for on, (psnr_y, _) in named.scores.items())
        + f"  {named.purpose}"
        for name, named in NAMED.items()
    )
