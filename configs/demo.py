"""A small teacher and student that train in about a minute each on two CPU cores: `make demo`.

python train.py --phase=teacher --preset=demo --data.hr-dirs DIR
python train.py --phase=student --preset=demo --data.hr-dirs DIR
"""

from dvmsr_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

_DATA = DataConfig(val_images=1, lr_crop=24, batch_size=8)
_OPTIM = OptimConfig(learning_rate=4e-3, schedule="cosine", warmup=0.05, ema_decay=0.98)

TEACHER = TrainConfig(
    phase="teacher",
    model=ModelConfig(channels=32, rssbs=2, vimms_per_rssb=1, drop_path=0.0),
    data=_DATA,
    optim=_OPTIM,
    steps=300,
    log_every=10,
    val_every=100,
    checkpoint_every=100,
)

STUDENT = TrainConfig(
    phase="student",
    model=ModelConfig(channels=24, rssbs=1, vimms_per_rssb=1, drop_path=0.0),
    data=_DATA,
    optim=_OPTIM,
    steps=300,
    log_every=10,
    val_every=100,
    checkpoint_every=100,
)
