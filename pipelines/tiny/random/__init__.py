"""Every supported family at a size that runs in milliseconds, with random weights."""

from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline, families, pipeline_families

__all__ = ["build_inputs", "build_model", "build_pipeline", "families", "pipeline_families"]
