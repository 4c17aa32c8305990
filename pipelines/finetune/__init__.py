"""LoRA fine-tuning at lengths beyond the training."""

from genattn.pipelines.finetune.tune import finetune

__all__ = ["finetune"]
