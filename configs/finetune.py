"""Fine-tuning: further training of given weights, on other pictures or for another scale.

    python train.py --phase=teacher --preset=finetune --init x4 --data.hr-dirs DIR

The network is that of the weights. This recipe made the project's x4 weights from the published
ones, in 45 minutes on two CPU cores; see docs/finetuning.md.
"""

import dataclasses

from dvmsr_jax.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

TEACHER = TrainConfig(
    phase="teacher",
    model=ModelConfig(drop_path=0.0),
    data=DataConfig(lr_crop=48, batch_size=8),
    loss=LossConfig(fft_weight=0.05),
    optim=OptimConfig(
        learning_rate=2e-4, schedule="cosine", warmup=0.02, clip=0.0, ema_decay=0.998
    ),
    steps=2_000,
    log_every=25,
    val_every=250,
    checkpoint_every=50,
)

STUDENT = dataclasses.replace(TEACHER, phase="student")
