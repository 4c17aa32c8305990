"""Rows of answers keep their kind, which pipelines ask for by attribute."""

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_motion_model import UNetMotionOutput

from genattn import apply
from genattn.guidance.passes.prediction import take_rows
from genattn.guidance.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_pipeline


@pytest.mark.parametrize("kind", [UNetMotionOutput, Transformer2DModelOutput])
def test_rows_of_an_output_object(kind: type) -> None:
    sample = torch.arange(4.0)[:, None]
    found = take_rows(kind(sample=sample), torch.tensor([2, 0]), 4)
    assert type(found) is kind
    assert found.sample.flatten().tolist() == [2.0, 0.0]


def test_one_batch_gives_what_an_extra_pass_gives_where_the_pipeline_asks_for_an_object() -> None:
    pipe, call = build_pipeline("animatediff")
    frames = []
    for mode in ("extra", "batched"):
        with apply(pipe, SoftPAG("L1", u=1.0, mode=mode)):
            frames.append(pipe(**{**call, "output_type": "latent"}, generator=torch.Generator().manual_seed(0))[0])
    stock = pipe(**{**call, "output_type": "latent"}, generator=torch.Generator().manual_seed(0))[0]
    assert float((frames[0] - stock).abs().max()) > 1e-3
    torch.testing.assert_close(*frames, atol=1e-4, rtol=1e-3)
