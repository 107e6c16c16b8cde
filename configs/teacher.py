"""The paper's teacher: 8 RSSBs of 192 channels, 7,107,312 parameters.

    python train.py --phase=teacher --data.hr-dirs DF2K/HR

Cost: 500,000 steps of 128 crops of 64x64; never run at this scale (`python -m benchmarks.training`
measures single steps).
Expected: the paper gives no score for its teacher alone.
"""

from dvmsr_jax.config import ModelConfig, TrainConfig

CONFIG = TrainConfig(phase="teacher", model=ModelConfig(channels=192, rssbs=8))
