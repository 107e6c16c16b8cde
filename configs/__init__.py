"""Presets of training runs, with their commands and, for the paper's, expected scores."""

from dvmsr_jax.config import TrainConfig
from dvmsr_jax.configs import demo, finetune, student, teacher

# preset -> phase -> configuration
PRESETS: dict[str, dict[str, TrainConfig]] = {
    "paper": {"teacher": teacher.CONFIG, "student": student.CONFIG},
    "demo": {"teacher": demo.TEACHER, "student": demo.STUDENT},
    "finetune": {"teacher": finetune.TEACHER, "student": finetune.STUDENT},
}
