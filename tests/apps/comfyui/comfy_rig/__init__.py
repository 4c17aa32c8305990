"""Stand-ins for what a tiny random checkpoint lacks: text encoder, VAE, FLUX's fixed width; custom nodes for tests only."""

import inspect

import comfy.model_detection
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import folder_paths
import torch

SEEN: list[int] = []


class RigConditioning:
    """Random context of a family's width."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "tokens": ("INT", {"default": 16}),
                "width": ("INT", {"default": 4096, "max": 65536}),
                "pooled": ("INT", {"default": 768, "max": 65536}),
                "seed": ("INT", {"default": 0}),
                "padding": ("INT", {"default": 0}),
                "pooled_seed": ("INT", {"default": -1, "min": -1}),
            }
        }

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "rig"

    def make(self, tokens, width, pooled, seed, padding, pooled_seed=-1):
        generator = torch.Generator().manual_seed(seed)
        other = generator if pooled_seed < 0 else torch.Generator().manual_seed(pooled_seed)
        told = {"pooled_output": torch.randn(1, pooled, generator=other), "guidance": 3.5}
        if padding:
            mask = torch.ones(1, tokens, dtype=torch.long)
            mask[:, tokens - padding :] = 0
            told["attention_mask"] = mask
        return ([[torch.randn(1, tokens, width, generator=generator), told]],)


class RigDecode:
    """The first three latent channels of every frame as pictures."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "decode", "rig"

    def decode(self, latent):
        samples = latent["samples"]
        samples = samples.transpose(1, 2).flatten(0, 1) if samples.ndim == 5 else samples
        return (samples[:, :3].movedim(1, -1).float(),)


class RigSave:
    """IMAGE as raw floats, for comparing to the bit."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "name": ("STRING", {"default": "x"})}}

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "rig", True

    def save(self, images, name):
        import numpy

        numpy.save(f"{folder_paths.get_output_directory()}/{name}.npy", images.numpy())
        return {"ui": {"text": [name]}}


class RigText:
    """Text, shown."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"forceInput": True})}}

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "show", "rig", True

    def show(self, text):
        return {"ui": {"text": [text]}}


class RigLoad:
    """A checkpoint whose width ComfyUI's detection fixes (FLUX in some versions), at the width that it has."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {"default": ""})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "rig"

    def load(self, name):
        state = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("diffusion_models", name))
        config = comfy.model_detection.model_config_from_unet(state, "")
        width = state["img_in.weight"].shape[0]
        config.unet_config |= {"hidden_size": width, "num_heads": width // 128}
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model(state, "")
        model.load_model_weights(state, "")
        device = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(model.to(device), load_device=device, offload_device=device),)


class RigThief:
    """A node of somebody else's that sets the one override slot and hands on to nobody, or hands on and counts."""

    seen = SEEN

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "chains": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "steal", "rig"

    def steal(self, model, chains):
        patched = model.clone()
        options = patched.model_options["transformer_options"]
        before = options.get("optimized_attention_override")
        self.seen.clear()

        def stolen(func, *args, **kwargs):
            self.seen.append(1)
            return before(func, *args, **kwargs) if chains and before else func(*args, **kwargs)

        options["optimized_attention_override"] = stolen
        return (patched,)


class RigRecord:
    """Keeps the queries of the first marked attention call, heads last, and where the node pack takes the text to stand."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": ("STRING", {"default": "x"})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "record", "rig"

    def record(self, model, name):
        import numpy

        patched = model.clone()
        options = patched.model_options["transformer_options"]
        before = options["optimized_attention_override"]
        place, kept = f"{folder_paths.get_output_directory()}/{name}", []

        def recording(func, q, k, v, heads, **kwargs):
            forward = kwargs["transformer_options"]["genattn_forward"]
            if forward.visit is not None and not kept:
                kept.append(1)
                query = q.transpose(1, 2).flatten(2) if kwargs.get("skip_reshape") else q
                numpy.save(f"{place}.npy", query.float().numpy())
                layout = forward.host.layout(forward.model, forward.entry, query.shape[1])
                is_text = [segment.kind == "text" for segment in layout.segments for _ in range(segment.length)]
                numpy.save(f"{place}_text.npy", is_text)
            return before(func, q, k, v, heads, **kwargs)

        options["optimized_attention_override"] = recording
        return (patched,)


class RigSeen:
    """How many calls the other node's override saw."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",)}}

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "show", "rig", True

    def show(self, latent):
        return {"ui": {"text": [str(len(RigThief.seen))]}}

    @classmethod
    def IS_CHANGED(cls, latent):
        return float("nan")


class RigTop:
    """What ComfyUI's newer Model Sparse Attention does: on top again in every step; what it declines goes on to who was there.

    takes: answer the self-attention itself, which its kernels do on a GPU; on a CPU it declines every call.
    """

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "takes": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "stand", "rig"

    def stand(self, model, takes):
        patched, own = model.clone(), set()

        def install(transformer_options):
            before = transformer_options.get("optimized_attention_override")
            if before in own:
                return

            def override(func, q, k, v, heads, *args, **kwargs):
                if takes and q.shape == k.shape:
                    return func(q, k, v, heads, *args, **kwargs)
                return before(func, q, k, v, heads, *args, **kwargs) if before else func(q, k, v, heads, *args, **kwargs)

            own.add(override)
            transformer_options["optimized_attention_override"] = override

        install(patched.model_options["transformer_options"])
        patched.add_callback_with_key(
            comfy.patcher_extension.CallbacksMP.ON_PREPARE_STATE, "rig_top",
            lambda patcher, timestep, options=None, *rest: options and install(options.setdefault("transformer_options", {})),
        )  # fmt: skip
        return (patched,)


class RigTakes(RigTop):
    """The same that always answers; only where the callback is told the options, else it is on top in the first step alone."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def stand(self, model):
        return super().stand(model, True)


class RigCoreSparse:
    """ComfyUI's own Model Sparse Attention, of versions that have it.

    takes: its kernel needs a GPU, so its check is passed and its kernel stood in for; else it declines every call, as on a CPU.
    """

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "takes": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "put", "rig"
    stock = None

    def put(self, model, takes):
        import sys
        import types

        import nodes

        node = nodes.NODE_CLASS_MAPPINGS["BlockSparseAttention"]
        core = sys.modules[node.__module__]
        if RigCoreSparse.stock is None:
            RigCoreSparse.stock = (core._ineligible, core.ck)
        core._ineligible, core.ck = RigCoreSparse.stock
        if takes:
            core._ineligible = lambda q, k, v, dim_head: None if q.shape == k.shape else "cross-attention"
            core.ck = types.SimpleNamespace(sol_attn=_every_other_key)
        widgets = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0, "extra_tokens": 0}
        return node.execute(model, {"selection": "sol-attn", "tau": 1.3}, **widgets).result


def _every_other_key(q, k, v, **_):
    q, k, v = (x.float().transpose(1, 2) for x in (q, k[:, ::2], v[:, ::2]))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class RigCompileBlocks:
    """KJNodes' compile of the blocks, by its own function, with the compiler that only traces."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "compile", "rig"

    def compile(self, model):
        import nodes

        theirs = nodes.NODE_CLASS_MAPPINGS["TorchCompileModelAdvanced"].patch.__globals__
        patched = model.clone()
        blocks = [f"diffusion_model.blocks.{place}" for place in range(3)]
        made = theirs["build_compile_kwargs"]("eager", "default", False, False)
        theirs["kj_set_torch_compile_wrapper"](model=patched, keys=blocks, **made)
        return (patched,)


class RigForward:
    """An object patch of a layer's forward, as KJNodes' Enhance-A-Video and its NAG put one."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "part": ("STRING", {"default": "self_attn"})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "rig"

    def patch(self, model, part):
        patched = model.clone()
        for place in range(3):
            layer = patched.get_model_object(f"diffusion_model.blocks.{place}.{part}")

            def forward(*args, layer=layer, **kwargs):
                return 1.25 * type(layer).forward(layer, *args, **kwargs)

            patched.add_object_patch(f"diffusion_model.blocks.{place}.{part}.forward", forward)
        return (patched,)


class RigCompile:
    """ComfyUI's TorchCompileModel with the compiler that only traces, so that a test need not wait for C++."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "backend": ("STRING", {"default": "eager"})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "compile", "rig"

    def compile(self, model, backend):
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        patched = model.clone()
        guards = {"guard_filter_fn": lambda entries: [("transformer_options" not in entry.name) for entry in entries]}
        set_torch_compile_wrapper(model=patched, backend=backend, options=guards)
        return (patched,)


class RigFail:
    """A node whose wrapper raises in the second forward, as one that runs out of memory does."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "fail", "rig"

    def fail(self, model):
        patched, seen = model.clone(), []

        def wrapper(executor, *args, **kwargs):
            seen.append(1)
            if len(seen) == 2:
                raise RuntimeError("the rig fails here")
            return executor(*args, **kwargs)

        patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "rig_fail", wrapper)
        return (patched,)


_NODES = (
    RigTop,
    RigCoreSparse,
    RigCompileBlocks,
    RigForward,
    RigCompile,
    RigFail,
    RigConditioning,
    RigDecode,
    RigSave,
    RigText,
    RigLoad,
    RigThief,
    RigRecord,
    RigSeen,
)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in _NODES}
if "model_options" in inspect.signature(comfy.model_patcher.ModelPatcher.prepare_state).parameters:
    NODE_CLASS_MAPPINGS["RigTakes"] = RigTakes
