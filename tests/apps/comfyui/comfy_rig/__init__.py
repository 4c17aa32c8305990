"""Stand-ins for what a tiny random checkpoint lacks: text encoder, VAE, FLUX's fixed width; custom nodes for tests only."""

import comfy.model_detection
import comfy.model_patcher
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


_NODES = (RigConditioning, RigDecode, RigSave, RigText, RigLoad, RigThief, RigRecord, RigSeen)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in _NODES}
