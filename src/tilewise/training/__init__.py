"""Training the small GPT on characters: data, loop, checkpoints, loss curve, sampling."""

from .checkpoint import Checkpoint, load_checkpoint, load_model
from .config import TrainConfig, resume_config
from .data import Corpus, Vocabulary, load_corpus
from .generate import Sample, generate_text
from .loop import TrainResult, train

__all__ = [
    "Checkpoint",
    "Corpus",
    "Sample",
    "TrainConfig",
    "TrainResult",
    "Vocabulary",
    "generate_text",
    "load_checkpoint",
    "load_corpus",
    "load_model",
    "resume_config",
    "train",
]
