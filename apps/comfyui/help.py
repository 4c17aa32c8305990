"""Help pages of the ComfyUI nodes: what a node is for, its inputs, outputs and advice; ComfyUI shows them beside it."""

from pathlib import Path

from genattn.apps.comfyui.nodes import node_specs
from genattn.apps.comfyui.schema import Field, NodeSpec
from genattn.whole_file import write_whole

ADVICE = {
    "GenAttn_SparseAttention": """
- `auto` takes what suits the model. By hand, start with `radial`, `dense_steps` 0.25 and `dense_blocks` 0.
- The first steps decide layout and motion, so they stay dense.
- Radial attention skips most of the frames that are far apart, so it does nothing for pictures: take `gna` or `adaptive` there.
- `profile` needs a map from the Profile node. `adaptive` chooses tiles in every call and needs nothing.
- With `min_tokens` -1, calls that would not be faster sparse stay dense, and the report says so. 0 switches that off.
- `window` and `stride` count tokens, not pixels: one token is 16 x 16 pixels and 4 frames for Wan and HunyuanVideo.
- A stride equal to the window, or a multiple of 8 tokens, gives fuller tiles and more speed than stride 1.
- `dense_steps` counts the steps of the sampler that runs. With two samplers (Wan 2.2's two experts) use `sigma_start` instead.
- To compare, set `pattern` to `dense`: the result is then exactly that of the model without this node.
- Put this node after any other node that sets an attention override. That override keeps running for dense calls.
""",
    "GenAttn_Guidance": """
- `softpag` moves single heads towards their own values by `u`; `pag` does so with whole layers, and `seg` blurs their queries.
- Layers are counted over all blocks in order: FLUX.1 has double blocks L0 to L18, then single blocks L19 to L56.
- Every guided step costs one more conditional pass. A window (`start`, `stop`, or noise levels) makes it cheaper.
- If contrast becomes too hard, lower `scale` or raise `rescale`.
- Several of these nodes on one MODEL add up. Sparse attention works in the extra pass too.
""",
    "GenAttn_NAG": """
- For models that run at CFG 1: FLUX schnell and dev, turbo and lightning LoRAs, self-forcing Wan. The sampler's own negative
  prompt has no effect there; connect the unwanted words here instead.
- Each step costs one more attention over the text, not a second pass of the model.
- If contrast becomes too hard or shapes break, lower `nag_scale` first, then `nag_alpha`.
- Cross-attention: Wan, LTX and LTX 2, Cosmos-Predict 2, SD 1.5 and SDXL. Joint attention: FLUX, FLUX.2, Chroma, HunyuanVideo,
  Qwen-Image, SD3. Other families are refused with the reason.
- With a CFG above 1 it acts on the positive pass alone. Sparse Attention and DiT Guidance may stand before or after it.
- ComfyUI's own Normalized Attention Guidance runs the negative prompt as a whole second pass. Use one of the two.
""",
    "GenAttn_FifoSampler": """
- Use it in SamplerCustom with a BasicScheduler, and an empty video latent as long as the film should be.
- Only text-to-video Wan: it takes one timestep per frame. For other bases use the Long Video node over diffusers.
- `window` should be the length the model was trained on, 21 latent frames for Wan 2.1.
- More steps in the scheduler mean a longer queue: every frame still takes as many steps, from noise to clean.
""",
    "GenAttn_HeadSetLoad": """
- Head sets found with diffusers work here: layers and heads are counted in the same way. A set of another model is refused.
""",
    "GenAttn_MaskPreview": """
- `text_tokens` matters for HunyuanVideo, FLUX and SD3, whose text stands in the same sequence.
- Nothing is run, so a setting can be judged before the first sampling. Density is the share of tile pairs that is computed.
""",
    "GenAttn_BlockProbe": """
- Blocks with a large error are the ones to list in `dense_blocks`.
- The probe looks at one noise level. Errors at high noise (sigma near 1) and low noise differ; look at both.
- With an empty latent the picture is pure noise. Connect a sampled latent to see the errors on a real picture.
""",
    "GenAttn_Profile": """
- Runs dense `runs` + 2 times with `sampling_steps` steps each, so it costs as much as that many short samplings. Do it once.
- The map fits the model it was made on; other sizes and lengths of that model may use it too.
- Connect `path` to Sparse Attention and set its `pattern` to `profile`. `genattn generate --attention FILE` takes it too.
- Two different prompts make a better map than two seeds: run it again with another name and compare the tables.
""",
    "GenAttn_Report": """
- Connect the MODEL that the sampler got, and the sampler's latent.
- If another node replaced the attention override, the first line names it. Move the GenAttn nodes after it.
""",
    "GenAttn_LoadPipeline": """
- With `offline` on, the network is not used. Only safetensors are read, and no remote code is run.
- The pipeline stays on its device while the workflow is cached; ComfyUI's own models make room before it samples.
""",
    "GenAttn_ApplyPipeline": """
- Settings are applied only while a sampler runs, so one loaded pipeline can feed a dense and a sparse branch.
""",
    "GenAttn_SampleImage": """
- Sizes of 0 take what the model was made for. Interrupt stops after the current step.
""",
    "GenAttn_SampleVideo": """
- Sizes of 0 take what the model was made for. Interrupt stops after the current step.
""",
    "GenAttn_LongVideo": """
- The film is written to the output folder while it is made and plays while it grows; after an interrupt you keep what was made.
- All frames also come out as IMAGE, so they are held in memory.
- `prompt` may be a schedule: 0:"a red circle" 120:"it turns blue".
""",
}


def page(spec: NodeSpec) -> str:
    """The Markdown page of one node."""
    lines = [f"# {spec.title}", "", spec.description, "", "## Inputs", "", "| input | type | default | meaning |"]
    lines += ["|---|---|---|---|", *(_row(field) for field in spec.inputs), "", "## Outputs", "", "| output | type | meaning |"]
    lines += ["|---|---|---|", *(f"| {out.id} | {out.type} | {out.tooltip} |" for out in spec.outputs)]
    return "\n".join([*lines, "", "## Advice", ADVICE[spec.id].rstrip(), ""])


def _row(field: Field) -> str:
    shown = "" if field.default in (None, "") else f"`{field.default}`"
    kind = ", ".join(field.options) if field.options else field.type + (" (optional)" if field.optional else "")
    return f"| {field.id} | {kind} | {shown} | {field.tooltip} |"


def write_pages(target: Path) -> list[Path]:
    """One page per node into a folder."""
    written = []
    for spec in node_specs():
        place = target / f"{spec.id}.md"
        write_whole(place, page(spec))
        written.append(place)
    return written
