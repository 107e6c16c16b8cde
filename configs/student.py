"""The paper's student: 4 RSSBs of 60 channels, 424,428 parameters, distilled from the teacher.

    python train.py --phase=student --data.hr-dirs DF2K/HR

Cost: 500,000 steps of 128 crops of 64x64, each more than doubled by the teacher's forward pass;
never run at this scale (`python -m benchmarks.training` measures single steps). Expected: 32.19 dB
on Set5, 28.61 dB on Set14 (the paper's table 3).
"""

from dvmsr_jax.config import TrainConfig

CONFIG = TrainConfig(phase="student")
